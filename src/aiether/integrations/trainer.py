"""Growth on a Hugging Face Trainer: `fit` drives the stages, the Trainer trains each of them.

A callback cannot swap a Trainer's model, so growing ends a stage: the Trainer returns, the state is
migrated, a checkpoint of the grown model is written, and `trainer.train(resume_from_checkpoint=...)`
starts the next stage around a fresh model, optimizer and schedule. Every stage boundary is therefore a
point to resume from, and growing and resuming are the same path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_callback import ExportableState

from aiether.growth import (
    GROWTH_PRESETS,
    Decision,
    GrowthConfig,
    GrowthController,
    family_of,
    planned_depth,
)

from ._callback import StageCallback
from ._checkpoint import Checkpoint, CheckpointStore, RunRecord, to_json
from ._growth_callback import GrowthCallback
from ._interrupt import InterruptFlag, catch_interrupts
from ._model import compile_blocks, frozen_names, grow_model
from ._observer import Row, RunObserver
from ._optimizer_state import OptimizerRecipe, capture_moments, rebind_scheduler, unwrap_optimizer
from ._quiet import quiet_about_tied_weights, without_progress_bars
from ._stage import Handover, Stage
from ._verify import check_blocks, check_one_device

_NEEDS_LOSS = ("geometric", "plateau")


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `checkpoint` is the newest complete one; pass it as `resume` to go on."""

    status: Literal["finished", "interrupted"]
    step: int
    depth: int
    num_growths: int
    train_seconds: float
    checkpoint: Path
    model: PreTrainedModel


def fit(
    trainer: Trainer,
    growth: GrowthConfig | str | None = None,
    *,
    output_dir: str | Path | None = None,
    resume: bool | str | Path = False,
    observers: Sequence[RunObserver] = (),
    compile: bool = False,
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
        checkpoint.
    observers
        Watchers of the run, see `RunObserver`.
    compile
        Compile the model block by block (CUDA and CPU); depth growth then makes no new graph.

    Raises
    ------
    ValueError
        If the Trainer is set up so that growth would silently go wrong; the message says what to change.
    GrowthError
        If after a growth a trainable tensor is not in the optimizer, or a new one does not train.
    """
    config = _growth_config(trainer, growth)
    _refuse_unsupported(trainer, config)
    for callback in _growth_callbacks(trainer):  # they act on their own only in a bare trainer.train()
        trainer.remove_callback(callback)
    with catch_interrupts() as interrupted:
        run = _Run(
            trainer,
            config,
            Path(output_dir or trainer.args.output_dir or "trainer_output"),
            observers,
            interrupted,
            compile,
        )
        return run.execute(resume)


def _growth_config(trainer: Trainer, growth: GrowthConfig | str | None) -> GrowthConfig:
    carried = _growth_callbacks(trainer)
    if isinstance(growth, GrowthConfig):
        return growth
    if growth is None and carried:
        return carried[0].growth
    name = growth or "recommended"
    if name not in GROWTH_PRESETS:
        raise ValueError(
            f"growth={name!r} is no preset; choose one of {sorted(GROWTH_PRESETS)} or pass a GrowthConfig"
        )
    return GrowthConfig(**GROWTH_PRESETS[name])


def _growth_callbacks(trainer: Trainer) -> list[GrowthCallback]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, GrowthCallback)]


def _refuse_unsupported(trainer: Trainer, config: GrowthConfig) -> None:
    args = trainer.args
    if not isinstance(trainer.model, PreTrainedModel):
        raise ValueError(f"fit needs a transformers model, not {type(trainer.model).__name__}")
    if trainer.model_init is not None:
        raise ValueError(
            "the Trainer has model_init, which would rebuild the small model at every stage; pass model="
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True compiles the whole model, again at every growth, and falls back to eager "
            "after 8 times; set it to False and call fit(trainer, compile=True), which compiles the blocks"
        )
    sharded = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "a model spread by device_map": trainer.is_model_parallel,
    }
    for backend, used in sharded.items():
        if used:
            raise ValueError(f"fit grows a whole model on one device so far, not {backend}: train without it")
    check_one_device(args)
    if isinstance(trainer.optimizer, AcceleratedOptimizer):
        raise ValueError(
            "the Trainer was trained before, and its optimizer and schedule are used up; make a new Trainer "
            "with the same arguments (fit(trainer, resume=True) then goes on from fit's newest checkpoint)"
        )
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True would show the same data again after every growth; set it to False"
        )
    if args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end would load a model of another depth; set it to False")
    if config.trigger in _NEEDS_LOSS and (trainer.eval_dataset is None or args.eval_strategy == "no"):
        raise ValueError(
            f"the {config.trigger} trigger decides at evaluations: give the Trainer an eval_dataset and "
            "eval_strategy='steps', or use the triggers fixed, random or never"
        )
    if isinstance(trainer.eval_dataset, dict):
        raise ValueError(
            "fit needs one eval_dataset, not a dictionary of several: the trigger follows one loss"
        )
    if config.protocol == "report" and trainer.lr_scheduler is not None:
        raise ValueError(
            "protocol='report' restarts the schedule, which a scheduler passed in optimizers=(...) cannot; "
            "set lr_scheduler_type in TrainingArguments instead, or protocol='none'"
        )
    check_blocks(trainer.model, family_of(trainer.model))


class _Run:
    """The state that outlives a stage."""

    def __init__(
        self,
        trainer: Trainer,
        config: GrowthConfig,
        output_dir: Path,
        observers: Sequence[RunObserver],
        interrupted: InterruptFlag,
        compile: bool,
    ) -> None:
        self.trainer: Any = trainer  # its own annotations carry every backend's placeholder types
        self.observers, self.interrupted, self.compile = list(observers), interrupted, compile
        self.total_steps, steps_per_epoch = _planned_steps(trainer)
        self.store = CheckpointStore(output_dir, keep=trainer.args.save_total_limit)
        self.save_interval_steps = _save_interval(trainer, self.total_steps, steps_per_epoch)
        model = _unwrapped(trainer)
        depth = model.config.num_hidden_layers
        self.controller = GrowthController(
            config,
            family_of(model),
            depth=depth,
            total_steps=self.total_steps,
            seed=trainer.args.seed,
            final_depth=planned_depth(config, depth),
            directory=output_dir / "window",
        )
        self.frozen = frozen_names(model)
        self.recipe = None if trainer.optimizer is None else OptimizerRecipe.of(self.trainer.optimizer, model)
        self.user_scheduler: Any = trainer.lr_scheduler
        self.optimizer_class: str | None = None
        self.handover = Handover()
        self.stage_index = 0
        self.train_seconds = 0.0
        self.saved_snapshots: set[int] = set()
        self.last: Checkpoint | None = None

    def execute(self, resume: bool | str | Path) -> FitResult:
        checkpoint = self._find(resume)
        if checkpoint is None:
            self._save(0)
        else:
            self._restore(checkpoint)
        strategy = self.trainer.args.save_strategy
        self.trainer.args.save_strategy = "no"  # the Trainer's own checkpoints key the optimizer by position
        try:
            return self._stages()
        finally:
            self.trainer.args.save_strategy = strategy

    def _stages(self) -> FitResult:
        while True:
            stage = self._run_stage()
            step = self.trainer.state.global_step
            self.train_seconds = stage.train_seconds
            model = _unwrapped(self.trainer)
            self.handover = Handover(
                moments=capture_moments(model, unwrap_optimizer(self.trainer.optimizer)),
                scheduler=stage.scheduler_state(),
                loss_window=stage.loss_window(),
            )
            if stage.decision is not None:
                self._grow(stage.decision, stage.last_evaluation, step)
            elif step < self.total_steps and self.controller.next_phase_step(step - 1) == step:
                self._next_phase(step)
            self._save(step)
            if step >= self.total_steps or self.interrupted:
                return self._result("finished" if step >= self.total_steps else "interrupted", step)

    def _run_stage(self) -> Stage:
        trainer, model = self.trainer, _unwrapped(self.trainer)
        assert self.last is not None
        if self.compile:
            compile_blocks(model, self.controller.family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                name not in self.frozen
            )  # the optimizer is built for every trainable tensor
        self._open_optimizer(model)
        stage = Stage(
            trainer,
            self.controller,
            self.handover,
            index=self.stage_index,
            total_steps=self.total_steps,
            frozen=self.frozen,
            train_seconds=self.train_seconds,
            observers=self.observers,
            interrupted=self.interrupted,
            save_interval_steps=self.save_interval_steps,
            save=self._save_running,
        )
        self.stage = stage
        callback = StageCallback(stage)
        trainer.add_callback(callback)
        wanted = trainer.args.eval_on_start
        trainer.args.eval_on_start = self.handover.pending_event is not None or (
            wanted and not self.last.step
        )
        set_seed(trainer.args.seed)  # the sampler's order derives from it: the same in every stage
        try:
            with quiet_about_tied_weights():
                trainer.train(resume_from_checkpoint=str(self.last.path) if self.last.step else None)
        finally:
            trainer.remove_callback(callback)
            trainer.args.eval_on_start = wanted
        return stage

    def _open_optimizer(self, model: PreTrainedModel) -> None:
        trainer: Any = self.trainer
        if self.recipe is None:
            trainer.optimizer = None
            trainer.create_optimizer()
        elif self.last is not None and self.last.step > 0:  # until then the user's own serves
            trainer.optimizer = self.recipe.build(model)
        name = type(unwrap_optimizer(trainer.optimizer)).__name__
        if self.optimizer_class not in (None, name):
            raise ValueError(
                f"the checkpoint holds the moments of {self.optimizer_class}, the optimizer is now {name}, "
                "which would not use them; resume with the optimizer of the first start"
            )
        self.optimizer_class = name
        if self.user_scheduler is not None:
            rebind_scheduler(self.user_scheduler, unwrap_optimizer(trainer.optimizer))
            trainer.lr_scheduler = self.user_scheduler
        else:
            trainer.lr_scheduler = None

    def _grow(self, decision: Decision, evaluation: Row, step: int) -> None:
        started, plan = time.perf_counter(), decision.plan
        assert plan is not None
        growth = grow_model(_unwrapped(self.trainer), self.handover.moments, self.controller, plan, step)
        self.frozen = frozenset(new for name in self.frozen for new in growth.renames[name])
        self.recipe = self.recipe and self.recipe.renamed(growth.renames)
        self.trainer.model = self.trainer.model_wrapped = growth.model
        self.handover.moments = growth.migration.state.moments
        self.handover.new_layers = tuple(plan.new_layers)
        self.stage_index += 1
        self.handover.pending_event = {
            "event": "growth",
            "step": step,
            "stage": self.stage_index,
            "depth_before": plan.depth_before,
            "depth_after": plan.depth_after,
            "reason": decision.reason,
            "plan": plan.to_dict(),
            "loss_before": evaluation["eval_loss"],
            "at_decision": evaluation,
            "tensors": growth.migration.tensor_metrics,
            "seconds": time.perf_counter() - started,
        }

    def _next_phase(self, step: int) -> None:
        self.stage_index += 1
        layers = self.controller.trainable(step)
        trainable = "all" if layers is None else sorted(layers)
        self._announce({"event": "phase", "step": step, "trainable": trainable})

    def _announce(self, event: Row) -> None:
        for observer in self.observers:
            observer.on_event({**event, "stage": self.stage_index})

    # -- checkpoints ----------------------------------------------------------------------------------

    def _save_running(self, step: int) -> None:
        if self.last is not None and self.last.step == step:
            return
        self.train_seconds = self.stage.train_seconds
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        live = Handover(
            moments=capture_moments(_unwrapped(self.trainer), optimizer),
            scheduler=self.stage.scheduler_state(),
            loss_window=self.stage.loss_window(),
            pending_event=self.handover.pending_event,
            new_layers=self.handover.new_layers if self.stage.watch is not None else (),
        )
        self._save(step, live)

    def _save(self, step: int, handover: Handover | None = None) -> None:
        if self.last is not None and (self.last.step, self.last.stage) == (step, self.stage_index):
            return  # resumed at this very point: what lies there is complete
        handover = handover or self.handover
        trajectory = self.controller.trajectory
        for snapshot_step in trajectory.steps:
            if snapshot_step not in self.saved_snapshots:
                self.store.write_snapshot(snapshot_step, trajectory.snapshot_items(snapshot_step))
                self.saved_snapshots.add(snapshot_step)
        record = RunRecord(
            total_steps=self.total_steps,
            controller=to_json(self.controller.state_dict()),
            train_seconds=self.train_seconds,
            frozen=sorted(self.frozen),
            scheduler=handover.scheduler,
            loss_window=handover.loss_window,
            pending_event=handover.pending_event,
            new_layers=list(handover.new_layers),
            snapshot_steps=list(trajectory.steps),
            optimizer=self.optimizer_class,
            optimizer_groups=self.recipe and [list(names) for names, _ in self.recipe.groups],
            observers=[observer.state() for observer in self.observers],
        )
        self.last = self.store.write(
            step=step,
            stage=self.stage_index,
            save_model=self._save_model,
            moments=handover.moments,
            record=record,
        )

    def _save_model(self, directory: Path) -> None:
        trainer = self.trainer
        with without_progress_bars():
            _unwrapped(trainer).save_pretrained(directory)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        trainer.state.save_to_json(str(directory / "trainer_state.json"))

    def _find(self, resume: bool | str | Path) -> Checkpoint | None:
        if resume is False:
            return None
        if resume is True:
            return self.store.latest()
        path = Path(resume).resolve()
        for checkpoint in self.store.complete():
            if checkpoint.path.resolve() == path:
                return checkpoint
        raise ValueError(f"resume={str(resume)!r} is no complete checkpoint of {self.store.directory}")

    def _restore(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.read_record()
        if record.total_steps != self.total_steps:
            raise ValueError(
                f"the checkpoint was written for {record.total_steps} steps, the Trainer plans "
                f"{self.total_steps}; resume with the arguments of the first start"
            )
        old = _unwrapped(self.trainer)
        with without_progress_bars():
            model = type(old).from_pretrained(
                checkpoint.path, dtype=old.dtype, attn_implementation=old.config._attn_implementation
            )
        model.loss_type = old.loss_type
        self.trainer.model = self.trainer.model_wrapped = model.to(self.trainer.args.device).train()
        if self.recipe is not None and record.optimizer_groups is not None:
            self.recipe = self.recipe.with_names(record.optimizer_groups)
        self.controller.load_state_dict(
            record.controller, self.store.read_snapshot, device=self.trainer.args.device
        )
        self.optimizer_class = record.optimizer
        self.saved_snapshots = set(record.snapshot_steps)
        self.frozen = frozenset(record.frozen)
        self.stage_index, self.train_seconds = checkpoint.stage, record.train_seconds
        self.handover = Handover(
            moments=checkpoint.read_moments(),
            scheduler=record.scheduler,
            loss_window=record.loss_window,
            pending_event=record.pending_event,
            new_layers=tuple(record.new_layers),
        )
        self.last = checkpoint
        if record.observers:  # none in a checkpoint that the callback wrote
            for observer, saved in zip(self.observers, record.observers, strict=True):
                observer.restore(saved)
        self._announce({"event": "resume", "step": checkpoint.step, "depth": model.config.num_hidden_layers})

    def _result(self, status: Literal["finished", "interrupted"], step: int) -> FitResult:
        assert self.last is not None
        model = _unwrapped(self.trainer)
        depth = model.config.num_hidden_layers
        growths = self.controller.num_growths
        return FitResult(status, step, depth, growths, self.train_seconds, self.last.path, model)


def _unwrapped(trainer: Any) -> PreTrainedModel:
    return trainer.accelerator.unwrap_model(trainer.model)


def _planned_steps(trainer: Trainer) -> tuple[int, int]:
    """(total optimizer steps, steps per epoch), as the Trainer itself counts them."""
    if isinstance(trainer.train_dataset, IterableDataset) and trainer.args.max_steps <= 0:
        raise ValueError("an iterable dataset has no length: set max_steps in TrainingArguments")
    values: Any = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return values[6], values[1]


def _save_interval(trainer: Trainer, total_steps: int, steps_per_epoch: int) -> int | None:
    args = trainer.args
    match str(getattr(args.save_strategy, "value", args.save_strategy)):
        case "no":
            return None
        case "epoch":
            return steps_per_epoch
        case "steps":
            return (
                int(args.save_steps) if args.save_steps >= 1 else max(1, round(args.save_steps * total_steps))
            )
        case other:
            raise ValueError(
                f"save_strategy={other!r} does not fit a growing model; use 'steps', 'epoch' or 'no'"
            )
