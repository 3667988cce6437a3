"""One stage of a run: training with a fixed architecture and a fixed set of trainable tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from aiether.growth import Decision, GrowthController

from ._checkpoint import Moments
from ._interrupt import InterruptFlag
from ._model import names_of_layers, seed_step, set_trainable
from ._observer import Row, RunObserver
from ._optimizer_state import load_moments, load_scheduler, scheduler_state, unwrap_optimizer
from ._verify import NewTensorWatch, check_optimizer_covers


@dataclass
class Handover:
    """What a stage receives from the one before, or from a checkpoint, besides the model itself."""

    moments: Moments = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None  # {"restart_step", "state"}
    loss_window: dict[str, float] | None = None  # {"sum", "since_step"}: what the next training row averages
    pending_event: Row | None = None  # a growth whose loss after it is not measured yet
    new_layers: tuple[int, ...] = ()


class Stage:
    """Runs between the Trainer's events; `decision` says afterwards why it ended."""

    def __init__(
        self,
        trainer: Trainer,
        controller: GrowthController,
        handover: Handover,
        *,
        index: int,
        total_steps: int,
        frozen: frozenset[str],
        train_seconds: float,
        observers: Sequence[RunObserver],
        interrupted: InterruptFlag,
        save_interval_steps: int | None,
        save: Callable[[int], None],
    ) -> None:
        # transformers annotates these attributes with every backend's placeholder types.
        self.trainer: Any = trainer
        self.controller, self.handover = controller, handover
        self.index, self.total_steps, self.frozen = index, total_steps, frozen
        self.train_seconds, self.observers, self.interrupted = train_seconds, observers, interrupted
        self.save_interval_steps, self.save = save_interval_steps, save
        self.decision: Decision | None = None
        self.watch: NewTensorWatch | None = None
        self.last_evaluation: Row = {}
        self._lap_start = time.perf_counter()
        self._unscaled: list[Any] = []
        self._learning_rate = 0.0
        self._restart_step: int | None = None  # where the schedule in use began

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def depth(self) -> int:
        return self.model.config.num_hidden_layers

    # -- the Trainer's events, in their order ----------------------------------------------------------

    def begin(self, step: int) -> None:
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        load_moments(self.model, optimizer, self.handover.moments)
        check_optimizer_covers(self.model, optimizer)
        self._continue_schedule(step)
        self._continue_loss_window()
        set_trainable(self.model, self.controller.family, self.frozen, self.controller.trainable(step))
        if self.handover.new_layers:
            names = (name for name, _ in self.model.named_parameters())
            new = names_of_layers(names, self.controller.family, self.handover.new_layers)
            self.watch = NewTensorWatch(self.model, optimizer, new)
        for observer in self.observers:
            observer.on_stage(stage=self.index, step=step, model=self.model, lineage=self.controller.lineage)
        self.handover.moments = {}  # the optimizer holds them now
        self._lap_start = time.perf_counter()

    def before_step(self, step: int) -> None:
        if self.save_interval_steps and step > 0 and step % self.save_interval_steps == 0:
            self.save(step)
            self._lap_start = time.perf_counter()
        seed_step(self.trainer.args.seed, step, self.trainer.args.process_index)

    def before_optimizer_step(self) -> None:
        groups = self.trainer.optimizer.param_groups
        scale = self.controller.lr_scale(self.trainer.state.global_step)
        self._unscaled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * scale
        self._learning_rate = float(groups[0]["lr"])
        if self.watch is not None:
            self.watch.before_step()

    def after_optimizer_step(self) -> None:
        # Schedulers that work from the last value must find their own, not ours.
        for group, lr in zip(self.trainer.optimizer.param_groups, self._unscaled, strict=True):
            group["lr"] = lr
        if self.watch is not None and self.watch.finished():
            self.watch = None

    def after_step(self, step: int, evaluates: bool) -> tuple[bool, bool]:
        """Returns (evaluate now, stop the stage)."""
        if self.controller.wants_snapshot(step):
            self.controller.snapshot(step, dict(self.model.named_parameters()))
        evaluates = evaluates or step == self.total_steps or self.controller.wants_evaluation(step)
        if evaluates and torch.cuda.is_available():
            torch.cuda.synchronize()  # or the evaluation's clock would pay for queued training steps
        now = time.perf_counter()
        self.train_seconds += now - self._lap_start
        self._lap_start = now
        for observer in self.observers:
            observer.on_step(step, self.train_seconds)
        return evaluates, bool(self.interrupted) or step == self.controller.next_phase_step(step - 1)

    def log(self, step: int, logs: dict[str, float]) -> None:
        row = {key: logs.get(key) for key in ("loss", "grad_norm")}
        row |= {"step": step, "learning_rate": self._learning_rate, "depth": self.depth, "stage": self.index}
        for observer in self.observers:
            observer.on_log(row | {"train_seconds": self.train_seconds})

    def evaluated(self, step: int, metrics: dict[str, float]) -> bool:
        """Take an evaluation; True when the stage is to end for a growth."""
        now = time.perf_counter()
        eval_seconds, self._lap_start = now - self._lap_start, now
        loss = metrics["eval_loss"]
        if self.handover.pending_event is not None:
            self._announce({**self.handover.pending_event, "loss_after": loss})
            self.handover.pending_event = None
            return False
        decision = self.controller.evaluate(step, loss, self.depth)
        row: Row = {"step": step, "stage": self.index, "depth": self.depth, "eval_loss": loss}
        row |= {"eval_seconds": eval_seconds, "eval_steps_per_s": metrics.get("eval_steps_per_second")}
        row |= self.controller.last_metrics
        self.last_evaluation = row
        for observer in self.observers:
            observer.on_evaluate(row | {"train_seconds": self.train_seconds})
        if decision.plan is None:
            return False
        self.decision = decision
        return True

    # -- state ----------------------------------------------------------------------------------------

    def scheduler_state(self) -> dict[str, Any]:
        return {"restart_step": self._restart_step, "state": scheduler_state(self.trainer.lr_scheduler)}

    def loss_window(self) -> dict[str, float]:
        """The training loss summed since the last training row, and that row's step."""
        trainer = self.trainer
        return {"sum": trainer._tr_loss.item(), "since_step": trainer._globalstep_last_logged}

    def _continue_loss_window(self) -> None:
        """The Trainer starts its mean anew in every train(): a row would miss the steps before this stage."""
        if self.handover.loss_window is not None:
            self.trainer._tr_loss.fill_(self.handover.loss_window["sum"])
            self.trainer._globalstep_last_logged = self.handover.loss_window["since_step"]

    def _continue_schedule(self, step: int) -> None:
        trainer, saved = self.trainer, self.handover.scheduler
        restart = self._restart_step = self.controller.restart_step(step)
        if restart is not None:
            trainer.lr_scheduler = None
            trainer.create_scheduler(self.total_steps - restart, trainer.optimizer)
            trainer.callback_handler.lr_scheduler = trainer.lr_scheduler
        if saved is not None and saved["restart_step"] == restart:
            load_scheduler(trainer.lr_scheduler, unwrap_optimizer(trainer.optimizer), saved["state"])

    def _announce(self, event: Row) -> None:
        for observer in self.observers:
            observer.on_event(event)
