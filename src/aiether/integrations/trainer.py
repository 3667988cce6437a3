"""Growth on a Hugging Face Trainer: `fit` drives the stages, the Trainer trains each of them.

A callback cannot swap a Trainer's model, so growing ends a stage: the Trainer returns, the state is
migrated, a checkpoint of the grown model is written, and `trainer.train(resume_from_checkpoint=...)`
starts the next stage around a fresh model, optimizer and schedule. Every stage boundary is therefore a
point to resume from, and growing and resuming are the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer

from aiether.growth import GrowthConfig

from ._budget import StepBudget
from ._fault import disk_full, is_disk_full
from ._interrupt import catch_interrupts
from ._loading import keep_copies_asynchronous
from ._lock import hold
from ._observer import RunObserver
from ._result import FitResult
from ._run import OnNan, Run
from ._setup import check_cuda_graphs, growth_callbacks, growth_config, refuse_unsupported


def fit(
    trainer: Trainer,
    growth: GrowthConfig | str | None = None,
    *,
    output_dir: str | Path | None = None,
    resume: bool | str | Path = False,
    observers: Sequence[RunObserver] = (),
    compile: bool = False,
    cuda_graphs: bool = False,
    on_nan: OnNan = "stop",
    max_skipped_steps: int = 10,
    budget: StepBudget | None = None,
) -> FitResult:
    """Train with `trainer`, growing its model when `growth` says so.

    The Trainer keeps its data, loss, arguments, logging and callbacks. Steps, schedule, optimizer moments
    (by parameter name) and the data position are carried through every growth; the random generators are
    seeded from (seed, step) at every step, so that a resumed run continues bit-equal on a CPU (if the data
    itself draws no random numbers as it is loaded).

    Parameters
    ----------
    trainer
        A Trainer that has not been trained yet, around a decoder of a registered family.
    growth
        A `GrowthConfig`, a preset's name, or None: the configuration of a `ProceduralGrowthCallback` among
        the Trainer's callbacks, else the preset `recommended`.
    output_dir
        Where checkpoints go; default `trainer.args.output_dir`.
    resume
        True: the newest complete checkpoint of `output_dir`, from the start if there is none. A path: that
        checkpoint. A damaged checkpoint is named and passed over.
    observers
        Watchers of the run, see `RunObserver`.
    compile
        Compile the model block by block (CUDA and CPU); depth growth then makes no new graph.
    cuda_graphs
        With `compile` on a CUDA device: replay each block as a CUDA graph, where the processor launches
        kernels more slowly than the GPU runs them. The loss must come from one forward pass of the model,
        and batches have few shapes: each is recorded.
    on_nan
        When the loss, the gradient norm or the weights become infinite or NaN: "stop", or "skip": go back to
        the newest checkpoint and on from there without that step's batch (the step counts, weights and
        moments stay as they are). Checkpoints never hold such values.
    max_skipped_steps
        How many steps "skip" may leave out before the run stops.
    budget
        What decides how many steps the run has, for a budget of something else than steps; asked after
        growths, probes and evaluations, see `StepBudget`. None: as the Trainer's arguments say.

    Ctrl-C and SIGTERM end the run with everything saved (status "interrupted"), a second one at once.

    Raises
    ------
    ValueError
        If the Trainer is set up so that growth would silently go wrong, another process works on
        `output_dir`, or no checkpoint there is complete; the message says what to change.
    RunFault
        If the disk is full, a number is not finite, or memory runs out; what was saved stays, and the message
        says how to go on.
    GrowthError
        If after a growth a trainable tensor is not in the optimizer, or a new one does not train.
    """
    config = growth_config(trainer, growth)
    refuse_unsupported(trainer, config, compiled=compile)
    keep_copies_asynchronous()
    if budget is not None and trainer.lr_scheduler is not None:
        raise ValueError(
            "a budget changes the number of steps, which a scheduler in optimizers=(...) cannot follow: "
            "set lr_scheduler_type in TrainingArguments instead"
        )
    if cuda_graphs:
        check_cuda_graphs(trainer, compile)
    for callback in growth_callbacks(trainer):  # they act on their own only in a bare trainer.train()
        trainer.remove_callback(callback)
    folder = Path(output_dir or trainer.args.output_dir or "trainer_output")
    with hold(folder), catch_interrupts() as interrupted:
        run = Run(
            trainer,
            config,
            folder,
            observers,
            interrupted,
            compile,
            cuda_graphs,
            on_nan,
            max_skipped_steps,
            budget,
        )
        try:
            return run.execute(resume)
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            what = getattr(error, "filename", None) or "a file of the run"
            raise disk_full(error, str(what), folder, run.last and run.last.path) from error
