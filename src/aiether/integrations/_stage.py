"""One stage of a run: training with a fixed architecture and a fixed set of trainable tensors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from aiether.growth import Decision, GrowthController

from ._budget import Length, Replan
from ._checkpoint import Moments
from ._finite import FiniteWatch, NotFinite, not_finite
from ._interrupt import InterruptFlag
from ._lr_policy import SlowedTensors
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
    pending_evaluation: bool = False  # this step's evaluation is to be done again
    pending_probe: Row | None = None  # the evaluation after which forks are to be tried, before the next step
    new_layers: tuple[int, ...] = ()


class StageLeft(Exception):
    """Raised in a callback to leave `trainer.train()` from where the Trainer would not stop."""


class Stage:
    """Runs between the Trainer's events; `decision` says afterwards why it ended."""

    def __init__(
        self,
        trainer: Trainer,
        controller: GrowthController,
        handover: Handover,
        *,
        index: int,
        frozen: frozenset[str],
        skipped: frozenset[int],
        train_seconds: float,
        observers: Sequence[RunObserver],
        interrupted: InterruptFlag,
        save_interval_steps: int | None,
        save: Callable[[int], None],
        length: Length | None = None,
    ) -> None:
        # transformers annotates these attributes with every backend's placeholder types.
        self.trainer: Any = trainer
        self.controller, self.handover = controller, handover
        self.index, self.frozen = index, frozen
        self.train_seconds, self.observers, self.interrupted = train_seconds, observers, interrupted
        self.save_interval_steps, self.save, self.skipped = save_interval_steps, save, skipped
        self.length = length
        self.replan: Replan | None = None
        self.decision: Decision | None = None
        self.watch: NewTensorWatch | None = None
        self.last_evaluation: Row = {}
        self.owes_evaluation = handover.pending_evaluation  # of the current step: due, and not done
        self.finite = FiniteWatch()
        self._gradient_norm: Any = None
        self._losses_before_step: Tensor | None = None  # where the running sum may have to go back to
        self._in_step = self._in_optimizer = False
        self._window_start = 0  # the step of the last training row
        self._steps_trained = self._batches_evaluated = 0
        self._lap_start = time.perf_counter()
        self._unscaled: list[Any] = []
        self._slowed = SlowedTensors(())
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
        self._slow_new_tensors()
        if self.handover.new_layers:
            names = (name for name, _ in self.model.named_parameters())
            new = names_of_layers(names, self.controller.family, self.handover.new_layers)
            self.watch = NewTensorWatch(self.model, optimizer, new)
        for observer in self.observers:
            observer.on_stage(stage=self.index, step=step, model=self.model, lineage=self.controller.lineage)
        self.handover.moments = {}  # the optimizer holds them now
        self._window_start = self.trainer._globalstep_last_logged
        self._lap_start = time.perf_counter()

    def before_step(self, step: int) -> None:
        if self.save_interval_steps and step > 0 and step % self.save_interval_steps == 0:
            self.save(step)
            self._lap_start = time.perf_counter()
        if self.interrupted:
            raise StageLeft
        if step in self.skipped or self.trainer.args.gradient_accumulation_steps > 1:
            self._losses_before_step = self.trainer._tr_loss.clone()
        self._in_step = True
        seed_step(self.trainer.args.seed, step, self.trainer.args.process_index)

    def between_batches(self) -> None:
        """A step of many batches is given up for an interrupt: the weights are as they were before it."""
        if self.interrupted:
            raise StageLeft

    def take_gradient_norm(self, norm: Any) -> None:
        self._gradient_norm = norm

    def before_optimizer_step(self) -> None:
        step = self.trainer.state.global_step
        if step in self.skipped:
            self._use_no_gradients(step)
        elif not self.trainer.args.fp16:  # whose scaler meets infinite gradients, and skips them, by design
            self.finite.note(step, self.trainer._tr_loss, self._gradient_norm)
        groups = self.trainer.optimizer.param_groups
        factors = self.controller.lr_factors(step)
        self._unscaled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * factors.old
        self._learning_rate = float(groups[0]["lr"])
        self._slowed.before(factors.new / factors.old)
        if self.watch is not None:
            self.watch.before_step(factors.new / factors.old)
        self._in_optimizer = True

    def _slow_new_tensors(self) -> None:
        """With policy `rewarm_new` the newest layers move by a fraction of what the optimizer does."""
        config, layers = self.controller.config, self.controller.newest_layers()
        if config.lr_policy == "rewarm_new" and layers:
            parameters = dict(self.model.named_parameters())
            names = names_of_layers(parameters, self.controller.family, layers)
            self._slowed = SlowedTensors(p for n in names if (p := parameters[n]).requires_grad)

    def _use_no_gradients(self, step: int) -> None:
        """Let the optimizer leave weights and moments alone, and the training loss without this step's."""
        if not_finite(self.model.named_parameters()):
            raise NotFinite(step - 1, "the weights are not finite after the update")
        self.model.zero_grad(set_to_none=True)
        assert self._losses_before_step is not None
        self.trainer._tr_loss.copy_(self._losses_before_step)

    def after_optimizer_step(self) -> None:
        self._slowed.after()
        self._in_optimizer = False
        # Schedulers that work from the last value must find their own, not ours.
        for group, lr in zip(self.trainer.optimizer.param_groups, self._unscaled, strict=True):
            group["lr"] = lr
        if self.watch is not None:
            self.finite.look()  # or gradients that are no numbers would count as none
            if self.watch.finished():
                self.watch = None

    def after_step(self, step: int, evaluates: bool) -> tuple[bool, bool]:
        """Returns (evaluate now, stop the stage)."""
        self._in_step, self._losses_before_step = False, None
        self._steps_trained += 1
        if self.controller.wants_snapshot(step):
            self.controller.snapshot(step, dict(self.model.named_parameters()))
        spent = self.train_seconds + time.perf_counter() - self._lap_start
        is_cut = self.length is not None and self.length.ends_at(step, spent)
        is_last = step == self.controller.total_steps
        evaluates = evaluates or is_last or self.controller.wants_evaluation(step)
        if evaluates:
            self.owes_evaluation, self._batches_evaluated = True, 0
            self.finite.look()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the evaluation's clock would pay for queued training steps
        now = time.perf_counter()
        self.train_seconds += now - self._lap_start
        self._lap_start = now
        for observer in self.observers:
            observer.on_step(step, self.train_seconds)
        ends = is_cut or step == self.controller.next_phase_step(step - 1)
        return evaluates, bool(self.interrupted) or ends

    def log(self, step: int, logs: dict[str, float]) -> None:
        self.finite.look()
        row: Row = {key: logs.get(key) for key in ("loss", "grad_norm")}
        since, self._window_start = self._window_start, step
        left_out = sum(since <= skipped < step for skipped in self.skipped)
        if left_out:  # the Trainer divides by all steps; none of a skipped step's figures mean anything
            counted = step - since - left_out
            row["loss"] = logs["loss"] * (step - since) / counted if counted else None
            row["grad_norm"] = None if step - 1 in self.skipped else row["grad_norm"]
        row |= {"step": step, "learning_rate": self._learning_rate, "depth": self.depth, "stage": self.index}
        for observer in self.observers:
            observer.on_log(row | {"train_seconds": self.train_seconds})

    def between_evaluation_batches(self) -> None:
        self._batches_evaluated += 1
        if self.interrupted:
            raise StageLeft

    def evaluated(self, step: int, metrics: dict[str, float]) -> bool:
        """Take an evaluation; True when the stage is to end for what follows from it."""
        now = time.perf_counter()
        eval_seconds, self._lap_start = now - self._lap_start, now
        batches, self._batches_evaluated = self._batches_evaluated, 0
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise NotFinite(step - 1, "the evaluation loss after it is not finite")
        if self.handover.pending_event is not None:
            self._announce({**self.handover.pending_event, "loss_after": loss})
            self.handover.pending_event = None
            return False
        decision = self.controller.evaluate(step, loss, self.depth)
        row: Row = {"step": step, "stage": self.index, "depth": self.depth, "eval_loss": loss}
        row |= {"eval_seconds": eval_seconds, "eval_steps_per_s": batches / eval_seconds}
        row |= {name: value for name, value in metrics.items() if _of_the_model(name, value)}
        row |= self.controller.last_metrics
        self.last_evaluation = row
        for observer in self.observers:
            observer.on_evaluate(row | {"train_seconds": self.train_seconds})
        self.owes_evaluation = False
        self._draw_conclusions(step, decision)
        ends = step in (self.controller.total_steps, self.controller.next_phase_step(step - 1))
        if self._steps_trained == 0 and (self.decision or self.replan or ends):
            raise StageLeft  # made up for at a stage's start, where the Trainer would train before it stops
        return self.decision is not None or self.replan is not None

    def _draw_conclusions(self, step: int, decision: Decision) -> None:
        """Whether the stage ends: for a growth, a probe, or another number of steps."""
        self.decision = decision if decision.plan is not None or decision.probe else None
        if self.length is None:
            return
        replan = self.length.correct(step, self.train_seconds)
        if self.decision is None:
            self.replan = replan
        elif self.length.is_too_short_for(decision.plan, step, self.train_seconds):
            self.decision = None

    # -- state ----------------------------------------------------------------------------------------

    def scheduler_state(self) -> dict[str, Any]:
        return {"restart_step": self._restart_step, "state": scheduler_state(self.trainer.lr_scheduler)}

    def loss_window(self) -> dict[str, float]:
        """The training loss summed since the last training row, and that row's step; whole steps only."""
        trainer, before = self.trainer, self._losses_before_step
        losses = trainer._tr_loss if before is None or not self._in_step else before
        return {"sum": losses.item(), "since_step": trainer._globalstep_last_logged}

    @property
    def weights_are_whole(self) -> bool:
        """Whether the weights are those after a whole number of steps (no optimizer step was cut short)."""
        return not self._in_optimizer

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
            trainer.create_scheduler(self.controller.total_steps - restart, trainer.optimizer)
            trainer.callback_handler.lr_scheduler = trainer.lr_scheduler
        if saved is not None and saved["restart_step"] == restart:
            load_scheduler(trainer.lr_scheduler, unwrap_optimizer(trainer.optimizer), saved["state"])

    def _announce(self, event: Row) -> None:
        for observer in self.observers:
            observer.on_event(event)


def _of_the_model(name: str, value: object) -> bool:
    """Whether a figure of an evaluation says something of the model beside its loss, not how fast it was."""
    speed = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    named = name.startswith("eval_") and name not in (*speed, "eval_model_preparation_time")
    return named and isinstance(value, int | float)
