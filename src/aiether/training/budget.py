"""How many steps a budget of FLOPs or seconds comes to, for a model that grows.

The learning-rate schedule and all fractions (growths, deadlines, the latest growth) are of a run's steps; the
budget only says how many steps that is. A run that grows by the clock is known in advance: the dearest number
of steps within the budget is found before it starts, by the trigger's own rules. Where the data decide
(triggers geometric, plateau and lag, and probes), the run is planned as if it kept its depth, or grew at its
deadlines, and planned again after every growth and probe. Seconds are planned with what a step of each depth
took on a model that was thrown away, and again where the clock shows that these were off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from aiether.growth import (
    GrowthConfig,
    Observation,
    Phases,
    TriggerState,
    decide,
    depth_schedule,
    plan_growth,
)
from aiether.integrations import Replan, Spent, StepBudget

MOST_STEPS = 10**9
OVERTIME = 1.02
"""No step begins once this multiple of a budget of seconds is spent."""
_OFF_COURSE = 0.01  # of the steps: less is not worth the end of a stage
_PAUSE = 0.05  # of the seconds, between two corrections
_FEW_STEPS = 10  # too few to tell how long one takes


@dataclass(frozen=True, kw_only=True)
class Position:
    """A point of a run: steps done, layers, growths so far, and the step from which everything trains."""

    step: int = 0
    depth: int
    growths: int = 0
    frozen_until: int = 0


@dataclass(frozen=True, kw_only=True)
class Course:
    """The growths of a run that its configuration foretells, whatever number of steps it has.

    Attributes
    ----------
    depth, final_depth: layers at the start and at most.
    seed: the run's, from which random times are drawn.
    eval_interval: steps between evaluations: a growth that is overdue waits for the next.
    """

    config: GrowthConfig
    depth: int
    final_depth: int
    seed: int
    eval_interval: int

    @property
    def is_known(self) -> bool:
        """Whether nothing but the number of steps decides when the model grows, and all that it costs."""
        if self.config.trigger == "lag":
            return False
        by_clock = self.config.trigger in ("fixed", "random") and not self.config.probes
        return by_clock or self.config.dry_run or self.config.trigger == "never"

    @property
    def start(self) -> Position:
        return Position(depth=self.depth)

    @property
    def depths(self) -> tuple[int, ...]:
        """Every depth that the run, or a fork of a probe, can have, in order."""
        if self.config.trigger == "never" or (self.config.dry_run and self.config.trigger != "lag"):
            return (self.depth,)
        depths = (self.depth, *depth_schedule(self.config, self.depth, final_depth=self.final_depth))
        return depths[: 1 + len(self.config.growth_fractions)] if self.config.trigger == "fixed" else depths

    def stretches(self, total_steps: int, at: Position | None = None) -> list[tuple[int, int]]:
        """(depth, steps) from `at` (default: the start) to the end of a run of `total_steps`.

        The model grows where the clock says so (at its deadlines for triggers that look at the data), and
        never otherwise.
        """
        at = at or self.start
        stretches: list[tuple[int, int]] = []
        while (after := self._next_growth(total_steps, at)) is not None:
            stretches.append((at.depth, after.step - at.step))
            at = after
        return [*stretches, (at.depth, total_steps - at.step)]

    def _next_growth(self, total_steps: int, at: Position) -> Position | None:
        config = self.config
        plan = plan_growth(config, at.depth, final_depth=self.final_depth)
        state = TriggerState.start(
            config, depth=self.depth, final_depth=self.final_depth, total_steps=total_steps, seed=self.seed
        )
        state = replace(state, growth_steps=(at.step,) * at.growths)
        if config.dry_run or plan is None or state.next_due_step is None:
            return None
        step = max(state.next_due_step, at.frozen_until)
        if step <= at.step:  # its own evaluation is past
            step = (at.step // self.eval_interval + 1) * self.eval_interval
        seen = Observation(
            step=step, total_steps=total_steps, depth=at.depth, final_depth=self.final_depth, eval_loss=1.0
        )
        if step >= total_steps or not decide(config, state, seen)[1].grow:
            return None
        frozen_until = Phases.after(plan, step, config).end if config.protocol == "report" else 0
        return Position(step=step, depth=plan.depth_after, growths=at.growths + 1, frozen_until=frozen_until)

    def cost(self, total_steps: int, per_step: Mapping[int, float], at: Position | None = None) -> float:
        """What the steps from `at` on cost, at so much a step of each depth; whole if the costs are."""
        return sum(steps * per_step[depth] for depth, steps in self.stretches(total_steps, at))

    def steps_within(self, budget: float, per_step: Mapping[int, float], at: Position | None = None) -> int:
        """A number of total steps that the budget is enough for from `at` on, where one more is too many.

        It is the largest where one more step never makes a run cheaper. The step of `at` if not even one
        more can be paid for.
        """
        at = at or self.start
        enough, cheapest = at.step, min(per_step[depth] for depth in self.depths if depth >= at.depth)
        too_many = at.step + min(int(max(budget, 0) // cheapest), MOST_STEPS) + 2
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if self.cost(middle, per_step, at) <= budget:
                enough = middle
            else:
                too_many = middle
        return enough


def _position(spent: Spent) -> Position:
    return Position(
        step=spent.step, depth=spent.depth, growths=spent.growths, frozen_until=spent.frozen_until
    )


def _layers(depth: int) -> str:
    return f"{depth} layer" if depth == 1 else f"{depth} layers"


class FlopsBudget(StepBudget):
    """Training FLOPs; the number of steps only ever shrinks.

    Parameters
    ----------
    per_step: FLOPs of a step by depth.
    spent: says how many FLOPs are spent so far, probes included.
    """

    def __init__(
        self, course: Course, flops: int, per_step: Mapping[int, int], spent: Callable[[], int]
    ) -> None:
        self.course, self.flops, self.per_step, self.spent = course, flops, per_step, spent

    def plan(self, spent: Spent) -> Replan:
        flops = self.spent() + sum(steps * self.per_step[depth] for depth, steps in spent.forks)
        steps = self.course.steps_within(self.flops - flops, self.per_step, _position(spent))
        reason = f"{flops:.4g} of {self.flops:.4g} FLOPs are spent, with {_layers(spent.depth)} from here"
        return Replan(min(steps, spent.total_steps), reason)


class SecondsBudget(StepBudget):
    """Seconds of training.

    Every evaluation sees how long a step takes at the present depth, and corrects a plan that this makes
    wrong by more than a hundredth; not in the last `decay_fraction` of the steps, in which schedule `wsd`
    decays.

    Parameters
    ----------
    per_step: seconds of a step by depth, measured beforehand.
    """

    def __init__(
        self, course: Course, seconds: float, per_step: Mapping[int, float], decay_fraction: float
    ) -> None:
        self.course, self.seconds, self.per_step = course, seconds, per_step
        self.decay_fraction = decay_fraction
        self._slower = 1.0  # a step takes so many times what was measured beforehand
        self._since = (0, 0.0)  # step and seconds from which this depth is timed
        self._corrected_at = 0.0

    def start(self, spent: Spent) -> None:
        self._since, self._corrected_at = (spent.step, spent.seconds), spent.seconds

    def plan(self, spent: Spent) -> Replan:
        per_step = {depth: self._slower * seconds for depth, seconds in self.per_step.items()}
        seconds = spent.seconds + sum(steps * per_step[depth] for depth, steps in spent.forks)
        steps = self.course.steps_within(self.seconds - seconds, per_step, _position(spent))
        pace = f"a step of {_layers(spent.depth)} takes {1000 * per_step[spent.depth]:.3g} ms"
        return Replan(min(steps, MOST_STEPS), f"{seconds:.4g} of {self.seconds:.4g} s are spent, and {pace}")

    def correct(self, spent: Spent) -> Replan | None:
        step, seconds = self._since
        if not spent.frozen_until <= step <= spent.step:  # frozen steps are cheaper; or the run went back
            self._since = (spent.step, spent.seconds)
            return None
        if spent.step - step < _FEW_STEPS:
            return None
        self._slower = (spent.seconds - seconds) / (spent.step - step) / self.per_step[spent.depth]
        replan = self.plan(spent)
        off = abs(replan.total_steps - spent.total_steps) > _OFF_COURSE * spent.total_steps
        waited = spent.seconds - self._corrected_at >= _PAUSE * self.seconds
        if not off or not waited or spent.step >= self._decay_start(spent):
            return None
        self._corrected_at = spent.seconds
        return replan

    def _decay_start(self, spent: Spent) -> int:
        scheduled = spent.total_steps - (spent.restart_step or 0)
        return spent.total_steps - max(1, round(self.decay_fraction * scheduled))

    def is_over(self, seconds: float) -> bool:
        return seconds >= OVERTIME * self.seconds
