"""A budget's steps, against a run that is walked through step by step with the controller's own decisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiether.growth import GrowthConfig, GrowthController, TriggerState, family_of, planned_depth
from aiether.integrations import Spent
from aiether.training.budget import Course, FlopsBudget, Position, SecondsBudget

FAMILY = family_of("gpt2")
COSTS = {depth: 10 + 7 * depth for depth in range(1, 9)}


def course(eval_interval: int = 5, depth: int = 1, seed: int = 0, **growth: Any) -> Course:
    config = GrowthConfig(
        **{"protocol": "none", "init": "copy", "warmup_steps": 0, "latest_growth": 1.0, **growth}
    )
    final = planned_depth(config, depth)
    return Course(config=config, depth=depth, final_depth=final, seed=seed, eval_interval=eval_interval)


def walked(of: Course, total_steps: int) -> list[int]:
    """The depth of every step, as the controller decides at every evaluation."""
    controller = GrowthController(
        of.config, FAMILY, depth=of.depth, total_steps=total_steps, seed=of.seed, final_depth=of.final_depth
    )
    depths: list[int] = []
    for step in range(1, total_steps + 1):
        depths.append(controller.depth)
        if not (step % of.eval_interval and step < total_steps) or controller.wants_evaluation(step):
            decision = controller.evaluate(step, 1.0)
            if decision.plan is not None:
                controller = controller.fork(decision.plan, step)
    return depths


@st.composite
def courses(draw: st.DrawFn) -> Course:
    trigger = draw(st.sampled_from(["never", "fixed", "random"]))
    fractions = draw(st.lists(st.floats(0.01, 0.89), min_size=1, max_size=3, unique=True))
    return course(
        trigger=trigger,
        growth_fractions=tuple(sorted(fractions)),
        latest_growth=0.9,
        warmup_steps=draw(st.integers(0, 30)),
        max_layers=draw(st.integers(1, 6)),
        grow_by=draw(st.sampled_from([1, 2, "double"])),
        protocol=draw(st.sampled_from(["none", "report"])),
        isolated_warmup_steps=draw(st.integers(0, 12)),
        unfreeze=draw(st.sampled_from(["at_once", "gradual"])),
        unfreeze_interval_steps=draw(st.integers(1, 4)),
        eval_interval=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 5)),
    )


@settings(max_examples=150, deadline=None)
@given(courses(), st.integers(40, 4000))
def test_a_run_that_is_known_spends_its_budget_to_the_last_step(of: Course, budget: int) -> None:
    assert of.is_known
    steps = of.steps_within(budget, COSTS)
    depths = walked(of, steps)
    assert [depth for depth, count in of.stretches(steps) for _ in range(count)] == depths
    assert set(depths) <= set(of.depths)
    spent = sum(COSTS[depth] for depth in depths)
    more = walked(of, steps + 1)
    assert spent == of.cost(steps, COSTS) <= budget < sum(COSTS[depth] for depth in more)
    if more[-1] == depths[-1] and is_on_time(of, depths) and is_on_time(of, more):
        assert budget - spent < COSTS[more[-1]]


def is_on_time(of: Course, depths: list[int]) -> bool:
    """Whether no growth had to wait, for an evaluation or the protocol."""
    state = TriggerState.start(
        of.config, depth=of.depth, final_depth=of.final_depth, total_steps=len(depths), seed=of.seed
    )
    grown_at = [at for at in range(1, len(depths)) if depths[at] != depths[at - 1]]
    return grown_at == list(state.due_steps[: len(grown_at)])


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(0, 3), st.integers(60, 6000))
def test_it_is_the_largest_number_of_steps(fraction: float, seed: int, budget: int) -> None:
    for trigger in ("fixed", "random"):
        of = course(trigger=trigger, growth_fractions=(fraction,), seed=seed, max_layers=3, grow_by=2)
        affordable = [n for n in range(1, budget // COSTS[1] + 2) if of.cost(n, COSTS) <= budget]
        assert of.steps_within(budget, COSTS) == max(affordable, default=0)


def test_a_plan_in_the_middle_counts_what_is_still_to_come() -> None:
    of = course(trigger="fixed", growth_fractions=(0.25, 0.5), max_layers=3)
    at = Position(step=25, depth=2, growths=1)
    assert of.stretches(100, at) == [(2, 25), (3, 50)]
    assert of.stretches(40, at) == [(2, 5), (3, 10)], "overdue: at the next evaluation"
    assert of.steps_within(COSTS[2] * 25 + COSTS[3] * 50 + COSTS[3] - 1, COSTS, at) == 100
    assert of.steps_within(COSTS[2] - 1, COSTS, at) == 25, "nothing left"
    assert of.steps_within(-5, COSTS, at) == 25
    frozen = replace(at, frozen_until=60)
    assert of.stretches(100, frozen) == [(2, 35), (3, 40)]


def test_a_trigger_on_data_is_planned_to_stay_or_to_grow_at_its_deadlines() -> None:
    of = course(trigger="geometric", max_layers=4)
    assert not of.is_known
    assert of.stretches(90) == [(1, 90)]
    of = course(trigger="plateau", max_layers=3, deadline_fractions=(0.3, 0.6))
    assert of.stretches(100) == [(1, 30), (2, 30), (3, 40)]
    assert course(trigger="geometric", max_layers=4, dry_run=True).is_known
    assert not course(trigger="lag", max_layers=4, dry_run=True).is_known, "its probes cost"
    assert not course(trigger="fixed", growth_fractions=(0.5,), lag_candidates=("stack/copy",)).is_known


def spent(step: int, seconds: float = 0.0, total_steps: int = 100, **changes: Any) -> Spent:
    standing: dict[str, Any] = {"depth": 1, "growths": 0, "frozen_until": 0, "restart_step": None}
    return Spent(step=step, total_steps=total_steps, seconds=seconds, **(standing | changes))


def test_flops_that_a_growth_leaves_are_planned_anew_and_the_steps_only_shrink() -> None:
    used = 50 * COSTS[1]
    budget = FlopsBudget(course(trigger="geometric", max_layers=2), 100 * COSTS[1], COSTS, lambda: used)
    grown = budget.plan(spent(50, depth=2, growths=1))
    assert grown.total_steps == 50 + used // COSTS[2]
    assert "2 layers" in grown.reason
    assert budget.plan(spent(50)).total_steps == 100
    assert budget.plan(spent(50, total_steps=60)).total_steps == 60
    forks = ((1, 30), (2, 10))
    left = used - 30 * COSTS[1] - 10 * COSTS[2]
    assert budget.plan(spent(50, forks=forks)).total_steps == 50 + left // COSTS[1]


def seconds_budget(**growth: Any) -> SecondsBudget:
    """Ten seconds, at a tenth of one for a step of one layer: a hundred steps."""
    of = course(**{"trigger": "geometric", "max_layers": 2, **growth})
    budget = SecondsBudget(of, 10.0, {1: 0.1, 2: 0.2}, decay_fraction=0.2)
    budget.start(spent(0))
    return budget


def test_seconds_are_planned_anew_where_the_clock_says_so() -> None:
    assert seconds_budget().correct(spent(40, 4.02)) is None, "off by half a hundredth"
    replan = seconds_budget().correct(spent(40, 5.0))
    assert replan is not None
    assert replan.total_steps == 80
    assert seconds_budget().correct(spent(85, 9.0)) is None, "the decay has begun"
    assert seconds_budget().correct(spent(9, 5.0)) is None, "too few steps to tell"
    faster = seconds_budget().correct(spent(40, 2.0))
    assert faster is not None
    assert faster.total_steps == 200
    budget = seconds_budget()
    assert budget.correct(spent(40, 5.0)) is not None
    assert budget.correct(spent(43, 5.3, total_steps=60)) is None, "so soon after the last time"


def test_other_depths_are_taken_to_be_as_much_slower_as_this_one() -> None:
    budget = seconds_budget()
    budget.correct(spent(40, 5.0))
    assert budget.plan(spent(40, 5.0, depth=2, growths=1)).total_steps == 40 + 20


def test_frozen_steps_and_those_before_a_rollback_are_not_timed() -> None:
    budget = seconds_budget()
    assert budget.correct(spent(20, 1.0, frozen_until=30)) is None
    assert budget.correct(spent(40, 3.5, frozen_until=30)) is None, "some of these steps were frozen"
    replan = budget.correct(spent(60, 6.5, frozen_until=30))
    assert replan is not None
    assert replan.total_steps == pytest.approx(60 + 3.5 / 0.15, abs=1)
    budget = seconds_budget()
    budget.start(spent(50, 5.0))
    assert budget.correct(spent(30, 3.0)) is None


def test_overtime_is_two_hundredths() -> None:
    assert not seconds_budget().is_over(10.19)
    assert seconds_budget().is_over(10.21)
