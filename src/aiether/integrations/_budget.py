"""How many steps a run has where its budget is of something else: FLOPs, or seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiether.growth import GrowthController, GrowthPlan

from ._observer import Row

Work = tuple[tuple[int, int], ...]
"""Training to be done: (depth, steps) each."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where a run stands when its steps are planned.

    Attributes
    ----------
    step, total_steps: optimizer steps done, and planned so far.
    depth, growths: layers now, and growths that led there.
    frozen_until: first step from which everything trains (the protocol of the last growth).
    restart_step: step at which the learning-rate schedule restarted last; None: never yet.
    seconds: of training so far.
    forks: what a probe would train before the next step.
    """

    step: int
    total_steps: int
    depth: int
    growths: int
    frozen_until: int
    restart_step: int | None
    seconds: float
    forks: Work = ()

    @classmethod
    def of(cls, controller: GrowthController, step: int, seconds: float, forks: Work = ()) -> Spent:
        return cls(
            step=step,
            total_steps=controller.total_steps,
            depth=controller.depth,
            growths=controller.num_growths,
            frozen_until=controller.frozen_until,
            restart_step=controller.restart_step(step),
            seconds=seconds,
            forks=forks,
        )


@dataclass(frozen=True)
class Replan:
    """The steps that a run has from now on, and why."""

    total_steps: int
    reason: str


class StepBudget:
    """Base of a budget for `fit`, which asks it for the run's steps; every method may be left as it is.

    The steps before the first plan are the Trainer's `max_steps`, and its `train_dataset` must be long enough
    for any plan. The learning-rate schedule, where it does not restart, follows the new number at once.
    """

    def start(self, spent: Spent) -> None:
        """Training begins, or goes on: from a checkpoint, whose number of steps it has, or after a growth."""

    def plan(self, spent: Spent) -> Replan:
        """After a growth or a probe, or (asked beforehand) as if there had been one."""
        return Replan(spent.total_steps, "steps are all there is to spend")

    def correct(self, spent: Spent) -> Replan | None:
        """After an evaluation: a plan that is worth the end of a stage; None: the present one stands."""
        return None

    def is_over(self, seconds: float) -> bool:
        """Whether no step may begin any more, whatever was planned."""
        return False


class Length:
    """How many steps a run has. Whoever follows it is told of a change: Trainer, controller, observers."""

    def __init__(
        self,
        trainer: Any,
        controller: GrowthController,
        budget: StepBudget | None,
        announce: Callable[[Row], None],
    ) -> None:
        self.trainer, self.controller, self.budget, self.announce = trainer, controller, budget, announce

    @property
    def total_steps(self) -> int:
        return self.controller.total_steps

    def _set(self, total_steps: int) -> None:
        self.trainer.args.max_steps = total_steps
        self.controller.replan(total_steps)

    def restore(self, total_steps: int) -> None:
        """Go on with a checkpoint's number of steps."""
        if self.budget is not None:
            self._set(total_steps)
        elif total_steps != self.total_steps:
            raise ValueError(
                f"the checkpoint was written for {total_steps} steps, the Trainer plans "
                f"{self.total_steps}; resume with the arguments of the first start"
            )

    def begin(self, step: int, seconds: float) -> None:
        if self.budget is not None:
            self.budget.start(Spent.of(self.controller, step, seconds))

    def plan_anew(self, step: int, seconds: float) -> None:
        """After a growth or a probe: what a step costs has changed, or what is spent."""
        if self.budget is not None:
            self.follow(self.budget.plan(Spent.of(self.controller, step, seconds)), step)
            self.begin(step, seconds)

    def follow(self, replan: Replan, step: int) -> None:
        """Have another number of steps from now on: schedule and growths by the clock follow."""
        total_steps = max(replan.total_steps, step)
        if total_steps != self.total_steps:
            self._set(total_steps)
            event = {"event": "replan", "step": step, "total_steps": total_steps, "reason": replan.reason}
            self.announce(event)

    def correct(self, step: int, seconds: float) -> Replan | None:
        """After an evaluation: what to follow from here."""
        return self.budget and self.budget.correct(Spent.of(self.controller, step, seconds))

    def ends_at(self, step: int, seconds: float) -> bool:
        """Whether this step is the last though more were planned; it is then told, and the plan changed."""
        if self.budget is None or step >= self.total_steps or not self.budget.is_over(seconds):
            return False
        spent = f"{seconds:.4g} s of training are spent"
        text = f"step {step}: {spent}: the run ends here, not at step {self.total_steps}"
        self.announce({"event": "warning", "step": step, "text": text})
        self.follow(Replan(step, spent), step)
        return True

    def is_too_short_for(self, plan: GrowthPlan | None, step: int, seconds: float, forks: Work = ()) -> bool:
        """Whether the budget leaves a grown model no step in which all of it trains; it is then told."""
        if self.budget is None or plan is None:
            return False
        grown = Spent.of(self.controller.fork(plan, step), step, seconds, forks)
        if self.budget.plan(grown).total_steps > step + self.controller.config.protocol_steps:
            return False
        text = f"step {step}: too late: the budget leaves no step to train {plan.depth_after} layers"
        self.announce({"event": "warning", "step": step, "text": text})
        return True
