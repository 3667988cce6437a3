"""A whole run under `fit`: stage after stage, the checkpoints between them, and the ways out of faults."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from aiether.growth import Decision, GrowthConfig, GrowthController, family_of, planned_depth

from ._budget import Length, StepBudget
from ._callback import StageCallback
from ._checkpoint import Checkpoint, CheckpointStore, RunRecord, to_json
from ._fault import OutOfMemory, RunFault, disk_full, is_disk_full, is_out_of_memory, out_of_memory
from ._finite import NotFinite, gradient_norms, moment_tensors, not_finite
from ._interrupt import InterruptFlag
from ._memory import check_memory
from ._model import compile_blocks, frozen_names, grow_model
from ._observer import Row, RunObserver
from ._optimizer_state import (
    OptimizerRecipe,
    capture_moments,
    rebind_scheduler,
    scheduler_state,
    unwrap_optimizer,
)
from ._probe import Forks, probe_event
from ._quiet import quiet_about_names_on_disk, without_progress_bars
from ._result import FitResult
from ._resume import find_checkpoint, load_model
from ._setup import planned_steps, save_interval, workload
from ._skip import skip_after, told
from ._stage import Handover, Stage, StageLeft
from ._switched import Switched

logger = logging.get_logger("aiether")

OnNan = Literal["stop", "skip"]


class Run:
    """The state that outlives a stage."""

    def __init__(
        self,
        trainer: Trainer,
        config: GrowthConfig,
        output_dir: Path,
        observers: Sequence[RunObserver],
        interrupted: InterruptFlag,
        compile: bool,
        cuda_graphs: bool,
        on_nan: OnNan,
        max_skipped_steps: int,
        budget: StepBudget | None = None,
    ) -> None:
        self.trainer: Any = trainer  # its own annotations carry every backend's placeholder types
        self.observers, self.interrupted = list(observers), interrupted
        self.compile, self.cuda_graphs = compile, cuda_graphs
        self.on_nan, self.max_skipped_steps = on_nan, max_skipped_steps
        total_steps, steps_per_epoch = planned_steps(trainer)
        self.store = CheckpointStore(output_dir, keep=trainer.args.save_total_limit)
        self.save_interval_steps = save_interval(trainer, total_steps, steps_per_epoch)
        model = _unwrapped(trainer)
        depth = model.config.num_hidden_layers
        self.controller = GrowthController(
            config,
            family_of(model),
            depth=depth,
            total_steps=total_steps,
            seed=trainer.args.seed,
            final_depth=planned_depth(config, depth),
            directory=output_dir / "window",
        )
        self.length = Length(trainer, self.controller, budget, self._announce)
        self.frozen = frozen_names(model)
        self.switched = Switched.of(model, self.controller.family)
        self.recipe = None if trainer.optimizer is None else OptimizerRecipe.of(self.trainer.optimizer, model)
        self.user_scheduler: Any = trainer.lr_scheduler
        self.own_optimizer_serves = True  # until its model is replaced, the one that the user built
        self.optimizer_class: str | None = None
        self.handover = Handover()
        if self.user_scheduler is not None:
            self.handover.scheduler = {"restart_step": None, "state": scheduler_state(self.user_scheduler)}
        self.stage_index = 0
        self.train_seconds = 0.0
        self.skips: list[Row] = []  # the steps whose batch is not used
        self.saved_snapshots: set[int] = set()
        self.last: Checkpoint | None = None

    def execute(self, resume: bool | str | Path) -> FitResult:
        work = workload(self.trainer)
        if work is not None:
            check_memory(_unwrapped(self.trainer), self.controller.config, work, self.trainer.args.device)
        checkpoint, damaged = find_checkpoint(self.store, resume)
        if checkpoint is None:
            bad = not_finite(_unwrapped(self.trainer).named_parameters())
            if bad is not None:
                raise ValueError(f"the model's tensor {bad!r} holds infinite or NaN values: load it anew")
            self._save(0)
        else:
            self._restore(checkpoint)
            for path, reason in damaged.items():
                self._announce_damage(path, reason, checkpoint)
            depth = _unwrapped(self.trainer).config.num_hidden_layers
            self._announce({"event": "resume", "step": checkpoint.step, "depth": depth})
            if checkpoint.step >= self.length.total_steps and not self.handover.pending_evaluation:
                return self._result("finished", checkpoint.step)
        assert self.last is not None
        self.length.begin(self.last.step, self.train_seconds)
        args = self.trainer.args
        before = args.save_strategy, args.logging_nan_inf_filter
        args.save_strategy = "no"  # the Trainer's own checkpoints key the optimizer by position
        args.logging_nan_inf_filter = False  # it hides such losses, and waits for the device at every step
        try:
            return self._stages()
        finally:
            args.save_strategy, args.logging_nan_inf_filter = before

    def _stages(self) -> FitResult:
        while True:
            due = self.handover.pending_probe
            if due is not None and not self._probe(due):
                return self._result("interrupted", due["step"])
            stage = self._new_stage()
            try:
                self._train(stage)
                self._end(stage)
            except NotFinite as fault:
                self._roll_back(fault)
                continue
            step = self.trainer.state.global_step
            finished = step >= self.length.total_steps and not self.handover.pending_evaluation
            if finished or self.interrupted:
                return self._result("finished" if finished else "interrupted", step)

    def _end(self, stage: Stage) -> None:
        """Take a stage's state over, grow or change the phase as it ended, and save."""
        stage.finite.look()
        step = self.trainer.state.global_step
        self.train_seconds = stage.train_seconds
        self.handover = self._handover(stage)
        self._check_finite(step, self.handover)
        if stage.replan is not None:
            self.stage_index += 1
            self.length.follow(stage.replan, step)
        grows = stage.decision is not None and stage.decision.grow
        for observer in self.observers:
            observer.on_stage_end(step=step, model=_unwrapped(self.trainer), grows=grows)
        if stage.decision is not None and stage.decision.probe:
            self.handover.pending_probe = stage.last_evaluation  # saved, so a probe cut short is repeated
        elif stage.decision is not None:
            try:
                self._grow(stage.decision, stage.last_evaluation, step)
            except Exception:  # nothing of the training is lost, and a resumed run decides once more
                self.handover.pending_evaluation = True
                self._save(step)
                raise
            self.length.plan_anew(step, self.train_seconds)
        elif not self.handover.pending_evaluation:
            self._next_phase_if_due(step)
        self._save(step)

    def _probe(self, evaluation: Row) -> bool:
        """Try forks, tell what they cost, and grow if one of them won; False when interrupted in it."""
        step, model = evaluation["step"], _unwrapped(self.trainer)
        self.own_optimizer_serves = False
        tried, forks = self.controller.candidates(), self._forks(step)
        work = forks.work_of(tried) if self.length.budget else ()
        if self.length.is_too_short_for(tried[-1].plan, step, self.train_seconds, work):
            self.handover.pending_probe = None
            self._next_phase_if_due(step)
            return True
        try:
            trials = forks.train(tried)
        except StageLeft:
            return False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(f"the probe at step {step}", str(error)) from None
        chosen, decision = self.controller.settle(tried, trials)
        event = probe_event(
            tried, trials, step=step, depth=self.controller.depth, chosen=chosen, reason=decision.reason
        )
        self.train_seconds += event["seconds"]
        self._announce(event)
        self.handover.pending_probe = None
        if decision.plan is None:
            self._next_phase_if_due(step)
        else:
            for observer in self.observers:
                observer.on_stage_end(step=step, model=model, grows=True)
            self._grow(decision, evaluation, step)
        self.length.plan_anew(step, self.train_seconds)
        self._save(step)
        return True

    def _forks(self, step: int) -> Forks:
        work = workload(self.trainer)
        assert self.last is not None
        assert work is not None  # refused otherwise
        return Forks(
            self.trainer,
            self.controller,
            self.handover,
            step=step,
            checkpoint=self.last.path,
            frozen=self.frozen,
            skipped=self._skipped,
            index=self.stage_index,
            interrupted=self.interrupted,
            work=work,
            prepare=self._prepare,
        )

    def _handover(self, stage: Stage) -> Handover:
        return Handover(
            moments=capture_moments(_unwrapped(self.trainer), unwrap_optimizer(self.trainer.optimizer)),
            scheduler=stage.scheduler_state(),
            loss_window=stage.loss_window(),
            pending_event=self.handover.pending_event,
            pending_evaluation=stage.owes_evaluation,
            new_layers=self.handover.new_layers if stage.watch is not None else (),
        )

    def _check_finite(self, step: int, handover: Handover) -> None:
        """No checkpoint holds ruined weights or moments: the last update would have made them."""
        model = _unwrapped(self.trainer)
        if not_finite(model.named_parameters()) or not_finite(moment_tensors(handover.moments)):
            raise NotFinite(step - 1, "the weights or moments are not finite after the update")

    def _new_stage(self) -> Stage:
        self._prepare(_unwrapped(self.trainer), {})
        return Stage(
            self.trainer,
            self.controller,
            self.handover,
            index=self.stage_index,
            frozen=self.frozen,
            skipped=self._skipped,
            train_seconds=self.train_seconds,
            observers=self.observers,
            interrupted=self.interrupted,
            save_interval_steps=self.save_interval_steps,
            save=self._save_running,
            length=self.length,
        )

    @property
    def _skipped(self) -> frozenset[int]:
        return frozenset(skip["step"] - 1 for skip in self.skips)

    def _prepare(self, model: PreTrainedModel, renames: Mapping[str, tuple[str, ...]]) -> None:
        """Compile a model and build its optimizer; `renames`: what names of the run's model are in it."""
        self.switched.apply(model, self.controller.family)
        if self.compile:
            compile_blocks(model, self.controller.family, cuda_graphs=self.cuda_graphs)
        frozen = {new for name in self.frozen for new in renames.get(name, (name,))}
        for name, parameter in model.named_parameters():
            # The optimizer is built for every trainable tensor.
            parameter.requires_grad_(name not in frozen)
        self._open_optimizer(model, self.recipe and self.recipe.renamed(renames))

    def _train(self, stage: Stage) -> None:
        """`trainer.train()` to the stage's end, wherever that is."""
        trainer, args = self.trainer, self.trainer.args
        assert self.last is not None
        self.stage = stage
        callback = StageCallback(stage)
        trainer.add_callback(callback)
        wanted = args.eval_on_start
        owed = self.handover.pending_event is not None or self.handover.pending_evaluation
        args.eval_on_start = owed or (wanted and not self.last.step)
        set_seed(args.seed)  # the sampler's order derives from it: the same in every stage
        out_of_memory: str | None = None
        try:
            with quiet_about_names_on_disk(), gradient_norms(trainer.accelerator, stage.take_gradient_norm):
                trainer.train(resume_from_checkpoint=str(self.last.path) if self.last.step else None)
        except StageLeft:
            trainer.is_in_train = False
            trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = " ".join(str(error).split()) or "out of memory"
        finally:
            trainer.remove_callback(callback)
            args.eval_on_start = wanted
        if out_of_memory is not None:  # outside of the handler, whose traceback holds on to activations
            self._run_out_of_memory(stage, out_of_memory)

    def _run_out_of_memory(self, stage: Stage, said: str) -> None:
        step = self.trainer.state.global_step
        if stage.weights_are_whole and step > 0:
            stage.finite.look()
            self._save_running(step)
        where = f"the evaluation at step {step}" if stage.owes_evaluation else f"step {step + 1}"
        raise self._out_of_memory(f"{where} with {stage.depth} layers", said)

    def _out_of_memory(self, where: str, said: str) -> OutOfMemory:
        window_on_device = self.controller.config.snapshot_storage == "device"
        return out_of_memory(where, said, self.trainer.args, window_on_device, self.last and self.last.path)

    def _roll_back(self, fault: NotFinite) -> None:
        """Go back to the last checkpoint and on from there without the batch, or raise if not asked to."""
        assert self.last is not None
        if self.on_nan == "stop":
            raise RunFault(
                f"{told(fault)}; nothing of it was saved",
                "Choose on_nan=skip to leave that step's batch out (or start anew at a lower learning rate)",
                self.last.path,
            )
        checkpoint = self.store.latest()
        skip = skip_after(fault, self.skips, checkpoint, max_skipped_steps=self.max_skipped_steps)
        assert checkpoint is not None
        skips = [*self.skips, skip]
        self._restore(checkpoint)
        for later in skips[len(self.skips) :]:  # the records went back to the checkpoint as well
            self._announce(later)
        self.skips = skips

    def _open_optimizer(self, model: PreTrainedModel, recipe: OptimizerRecipe | None) -> None:
        trainer: Any = self.trainer
        if recipe is None:
            trainer.optimizer = None
            trainer.create_optimizer()
        elif not self.own_optimizer_serves:
            trainer.optimizer = recipe.build(model)
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
        self.own_optimizer_serves = False
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

    def _next_phase_if_due(self, step: int) -> None:
        if step >= self.length.total_steps or self.controller.next_phase_step(step - 1) != step:
            return
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
        self.stage.finite.look()
        self.train_seconds = self.stage.train_seconds
        live = self._handover(self.stage)
        self._check_finite(step, live)
        self._save(step, live)

    def _save(self, step: int, handover: Handover | None = None) -> None:
        if self.last is not None and (self.last.step, self.last.stage) == (step, self.stage_index):
            return  # resumed at this very point: what lies there is complete
        for is_last_try in (False, True):
            try:
                self.last = self._write(step, handover or self.handover)
                return
            except (OSError, SafetensorError) as error:
                if not is_disk_full(error):
                    raise
                full = disk_full(
                    error,
                    f"the checkpoint of step {step}",
                    self.store.directory,
                    self.last and self.last.path,
                )
            if is_last_try or not self.store.make_room():
                raise full

    def _write(self, step: int, handover: Handover) -> Checkpoint:
        trajectory = self.controller.trajectory
        for snapshot_step in trajectory.steps:
            if snapshot_step not in self.saved_snapshots:
                self.store.write_snapshot(snapshot_step, trajectory.snapshot_items(snapshot_step))
                self.saved_snapshots.add(snapshot_step)
        record = RunRecord(
            total_steps=self.length.total_steps,
            controller=to_json(self.controller.state_dict()),
            train_seconds=self.train_seconds,
            frozen=sorted(self.frozen),
            scheduler=handover.scheduler,
            loss_window=handover.loss_window,
            pending_event=handover.pending_event,
            pending_probe=handover.pending_probe,
            pending_evaluation=handover.pending_evaluation,
            skips=self.skips,
            new_layers=list(handover.new_layers),
            snapshot_steps=list(trajectory.steps),
            optimizer=self.optimizer_class,
            optimizer_groups=self.recipe and [list(names) for names, _ in self.recipe.groups],
            observers=[observer.state() for observer in self.observers],
        )
        return self.store.write(
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

    def _announce_damage(self, path: Path, reason: str, used: Checkpoint) -> None:
        if not self.observers:
            logger.warning(f"the checkpoint {path} is damaged ({reason}); going on from {used.path}")
        self._announce({"event": "damaged", "step": used.step, "checkpoint": path.name, "reason": reason})

    def _restore(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.read_record()
        self.length.restore(record.total_steps)
        model = load_model(_unwrapped(self.trainer), checkpoint).to(self.trainer.args.device).train()
        self.trainer.model = self.trainer.model_wrapped = model
        if self.recipe is not None and record.optimizer_groups is not None:
            self.recipe = self.recipe.with_names(record.optimizer_groups)
        device = self.trainer.args.device
        self.controller.load_state_dict(record.controller, self.store.read_snapshot, device=device)
        self.optimizer_class = record.optimizer
        self.saved_snapshots = self.store.adopt(checkpoint)
        self.skips = list(record.skips)
        self.own_optimizer_serves = False
        self.frozen = frozenset(record.frozen)
        self.stage_index, self.train_seconds = checkpoint.stage, record.train_seconds
        self.handover = Handover(
            moments=checkpoint.read_moments(),
            scheduler=record.scheduler,
            loss_window=record.loss_window,
            pending_event=record.pending_event,
            pending_probe=record.pending_probe,
            pending_evaluation=record.pending_evaluation,
            new_layers=tuple(record.new_layers),
        )
        self.last = checkpoint
        if record.observers:  # none in a checkpoint that the callback wrote
            for observer, saved in zip(self.observers, record.observers, strict=True):
                observer.restore(saved)

    def _result(self, status: Literal["finished", "interrupted"], step: int) -> FitResult:
        assert self.last is not None
        model, growths = _unwrapped(self.trainer), self.controller.num_growths
        depth = model.config.num_hidden_layers
        signal = self.interrupted.signal_name if status == "interrupted" else None
        return FitResult(status, step, depth, growths, self.train_seconds, self.last.path, model, signal)


def _unwrapped(trainer: Any) -> PreTrainedModel:
    return trainer.accelerator.unwrap_model(trainer.model)
