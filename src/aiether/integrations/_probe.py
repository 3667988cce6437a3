"""A probe: forks of the model at a stage's end, each trained a little by the same Trainer and thrown away.

A fork sees the batches, the random numbers, the schedule and the protocol that the run would see next. The
run goes on from the checkpoint that was written before the probe, so a probe that is cut short is repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import DefaultFlowCallback

from aiether.evaluation import flops_per_token, measure_flops_per_token
from aiether.growth import Candidate, GrowthController, GrowthPlan, Trial, grow_config, trial_steps
from aiether.growth.blank import without_weights

from ._budget import Work
from ._callback import StageCallback
from ._checkpoint import Moments
from ._finite import NotFinite, gradient_norms
from ._interrupt import InterruptFlag
from ._memory import Workload
from ._model import fork_model, with_settings
from ._quiet import quiet_about_names_on_disk
from ._stage import Handover, Stage, StageLeft

Prepare = Callable[[PreTrainedModel, dict[str, tuple[str, ...]]], None]


class _ForkStage(Stage):
    """A stage that ends with its one evaluation, of which nobody is told."""

    end_step = 0
    loss = math.inf

    def after_step(self, step: int, evaluates: bool) -> tuple[bool, bool]:
        self._in_step, self._losses_before_step = False, None
        ends = step == self.end_step
        if ends:
            self.finite.look()
        return ends, ends

    def log(self, step: int, logs: dict[str, float]) -> None:
        """A fork's figures are not the run's."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> bool:
        self.loss = metrics["eval_loss"]
        return True


class _ForkCallback(StageCallback):
    """Leaves the Trainer's own rhythm of logging and evaluating aside."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        evaluate, stop = self.stage.after_step(state.global_step, False)
        control.should_evaluate, control.should_training_stop, control.should_log = evaluate, stop, False


class Forks:
    """Forks of a run's model at one step.

    Parameters
    ----------
    checkpoint: the folder of that step, for the Trainer's position in the data.
    handover, frozen, skipped, index: as the run's next stage would have them.
    work: what a step consists of, for the FLOPs.
    prepare: gives a fork its optimizer; takes the model and what each old name has become.
    """

    def __init__(
        self,
        trainer: Any,
        controller: GrowthController,
        handover: Handover,
        *,
        step: int,
        checkpoint: Path,
        frozen: frozenset[str],
        skipped: frozenset[int],
        index: int,
        interrupted: InterruptFlag,
        work: Workload,
        prepare: Prepare,
    ) -> None:
        self.trainer, self.controller, self.handover = trainer, controller, handover
        self.step, self.checkpoint = step, checkpoint
        self.frozen, self.skipped, self.index = frozen, skipped, index
        self.interrupted, self.work, self.prepare = interrupted, work, prepare

    def train(self, candidates: Sequence[Candidate]) -> list[Trial]:
        """Train and evaluate one fork after the other, for the same FLOPs.

        Raises
        ------
        StageLeft
            If the run was interrupted meanwhile.
        """
        flops, steps = self._costs(candidates)
        trials: list[Trial] = []
        for candidate, count, cost in zip(candidates, steps, flops, strict=True):
            started = time.perf_counter()
            with _lent(self.trainer, self.checkpoint) as base:
                loss = self._loss_after(base, candidate.plan, count)
            seconds = time.perf_counter() - started
            trials.append(Trial(steps=count, flops=count * cost, seconds=seconds, eval_loss=loss))
        return trials

    def _costs(self, candidates: Sequence[Candidate]) -> tuple[list[int], tuple[int, ...]]:
        """FLOPs of a step of each candidate, and how many steps it trains."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        flops = [step_flops(model, candidate.plan, self.controller, self.work) for candidate in candidates]
        return flops, trial_steps(self.controller.config.lag_steps, flops)

    def work_of(self, candidates: Sequence[Candidate]) -> Work:
        """What `train` will train."""
        depths = [c.plan.depth_after if c.plan else self.controller.depth for c in candidates]
        return tuple(zip(depths, self._costs(candidates)[1], strict=True))

    def _loss_after(self, base: PreTrainedModel, plan: GrowthPlan | None, steps: int) -> float:
        model, moments, renames = fork_model(base, self.handover.moments, self.controller, plan, self.step)
        self.trainer.model = self.trainer.model_wrapped = model
        self.prepare(model, renames)
        stage = self._stage(plan, moments, renames, self.step + steps)
        del moments  # the optimizer takes copies: no third set of them
        callback = _ForkCallback(stage)
        self.trainer.callback_handler.callbacks.append(callback)
        set_seed(self.trainer.args.seed)
        try:
            with (
                quiet_about_names_on_disk(),
                gradient_norms(self.trainer.accelerator, stage.take_gradient_norm),
            ):
                self.trainer.train(resume_from_checkpoint=str(self.checkpoint))
        except NotFinite:
            return math.inf
        if self.interrupted:
            raise StageLeft
        return stage.loss if math.isfinite(stage.loss) else math.inf

    def _stage(
        self, plan: GrowthPlan | None, moments: Moments, renames: dict[str, tuple[str, ...]], end_step: int
    ) -> _ForkStage:
        stage = _ForkStage(
            self.trainer,
            self.controller.fork(plan, self.step),
            Handover(moments=moments, scheduler=self.handover.scheduler),
            index=self.index,
            frozen=frozenset(new for name in self.frozen for new in renames.get(name, (name,))),
            skipped=self.skipped,
            train_seconds=0.0,
            observers=(),
            interrupted=self.interrupted,
            save_interval_steps=None,
            save=_save_nothing,
        )
        stage.end_step = end_step
        return stage


def _save_nothing(step: int) -> None:
    """A fork leaves nothing behind."""


@contextmanager
def _lent(trainer: Any, checkpoint: Path) -> Iterator[PreTrainedModel]:
    """The Trainer for a fork, without the user's callbacks; afterwards as it was."""
    args, handler = trainer.args, trainer.callback_handler
    model, callbacks = trainer.accelerator.unwrap_model(trainer.model), handler.callbacks
    settings = args.eval_on_start, args.restore_callback_states_from_checkpoint
    args.eval_on_start = args.restore_callback_states_from_checkpoint = False
    handler.callbacks = [DefaultFlowCallback()]
    trainer._load_from_checkpoint = _load_nothing  # the folder holds the run's weights, not the fork's
    try:
        yield model
    finally:
        del trainer._load_from_checkpoint
        args.eval_on_start, args.restore_callback_states_from_checkpoint = settings
        handler.callbacks, trainer.is_in_train = callbacks, False
        trainer.model = trainer.model_wrapped = handler.model = model
        trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer.accelerator.free_memory()


def _load_nothing(*_: Any, **__: Any) -> None:
    pass


def step_flops(
    model: PreTrainedModel, plan: GrowthPlan | None, controller: GrowthController, work: Workload
) -> int:
    """Training FLOPs of one optimizer step of the model as it is (None) or grown by `plan`."""
    config = model.config
    if plan is not None:
        config = with_settings(config, grow_config(config.to_dict(), plan, controller.family))
    tokens = work.batch_size * work.accumulation * work.context_length
    try:
        return tokens * flops_per_token(config, work.context_length, work.batch_size)
    except ValueError:  # no closed form: counted on a twin without weights
        with without_weights():
            twin = type(model)(config)
        return tokens * measure_flops_per_token(twin, work.context_length, work.batch_size)


def probe_event(
    candidates: Sequence[Candidate],
    trials: Sequence[Trial],
    *,
    step: int,
    depth: int,
    chosen: str,
    reason: str,
) -> dict[str, Any]:
    """The record of a probe: every candidate with its cost and its loss, and what all of it cost."""
    return {
        "event": "probe",
        "step": step,
        "depth": depth,
        "chosen": chosen,
        "reason": reason,
        "steps": sum(trial.steps for trial in trials),
        "flops": sum(trial.flops for trial in trials),
        "seconds": sum(trial.seconds for trial in trials),
        "candidates": [
            {
                "name": candidate.name,
                "depth": candidate.plan.depth_after if candidate.plan else depth,
                **trial.to_dict(),
            }
            for candidate, trial in zip(candidates, trials, strict=True)
        ],
    }
