from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.geometry import GeometryMetrics
from aiether.growth import (
    TRIGGERS,
    Decision,
    GrowthConfig,
    Observation,
    TriggerState,
    decide,
    growth_warnings,
    relative_improvement,
)

CALM, STAGNANT = (1.9, 0.6), (2.0, 0.5)  # at the thresholds counts (Definition 19)


def measured(
    tau: float, kappa: float, tau_normalised: float = 0.0, kappa_normalised: float = 0.0
) -> GeometryMetrics:
    fields = dict.fromkeys(GeometryMetrics.__dataclass_fields__, 0.0)
    fields |= {
        "tau": tau,
        "kappa": kappa,
        "tau_normalised": tau_normalised,
        "kappa_normalised": kappa_normalised,
    }
    return GeometryMetrics(**fields)  # pyright: ignore[reportArgumentType]


def observe(
    step: int, loss: float = 3.0, metrics: GeometryMetrics | None = None, **changes: Any
) -> Observation:
    settings: dict[str, Any] = {"total_steps": 10_000, "depth": 3, "final_depth": 6, "num_snapshots": 15}
    return Observation(step=step, eval_loss=loss, metrics=metrics, **{**settings, **changes})


def run(config: GrowthConfig, observations: list[Observation]) -> tuple[TriggerState, list[Decision]]:
    state, decisions = TriggerState(), []
    for observation in observations:
        state, decision = decide(config, state, observation)
        decisions.append(decision)
    return state, decisions


def grows(decisions: list[Decision]) -> list[bool]:
    return [decision.grow for decision in decisions]


def test_geometric_counts_consecutive_stagnation_and_resets() -> None:
    config = GrowthConfig(pg_patience=3, pg_threshold=1.0, warmup_steps=0)
    path = [STAGNANT, STAGNANT, CALM, STAGNANT, (9.0, 0.49), STAGNANT, STAGNANT, STAGNANT, STAGNANT]
    state, counts, decisions = TriggerState(), [], []
    for step, (tau, kappa) in enumerate(path):
        state, decision = decide(config, state, observe(step, metrics=measured(tau, kappa)))
        counts.append(state.stagnation)
        decisions.append(decision)
    assert counts == [1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert grows(decisions) == [False] * 7 + [True, True]


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 6))
def test_geometric_grows_exactly_where_the_last_patience_evaluations_stagnated(
    path: list[bool], patience: int
) -> None:
    config = GrowthConfig(pg_patience=patience, pg_threshold=1.0, warmup_steps=0)
    observations = [observe(s, metrics=measured(*(STAGNANT if bad else CALM))) for s, bad in enumerate(path)]
    _, decisions = run(config, observations)
    expected = [i >= patience and all(path[i - patience + 1 : i + 1]) for i in range(len(path))]
    assert grows(decisions) == expected


def test_thresholds_are_compared_with_raw_or_normalised_values() -> None:
    raw_only, normalised_only = measured(5.0, 5.0, 0.1, 0.1), measured(1.0, 0.1, 0.9, 0.9)
    for thresholds, metrics, expected in [
        ("raw", raw_only, 1),
        ("raw", normalised_only, 0),
        ("normalised", raw_only, 0),
        ("normalised", normalised_only, 1),
    ]:
        config = (
            GrowthConfig(thresholds=thresholds, tau_crit=0.5, kappa_crit=0.5)
            if thresholds == "normalised"
            else GrowthConfig()
        )
        state, _ = decide(config, TriggerState(), observe(500, metrics=metrics))
        assert state.stagnation == expected


def test_no_check_before_warmup_steps() -> None:
    config = GrowthConfig(pg_patience=2, pg_threshold=1.0, warmup_steps=400)
    path = [observe(step, metrics=measured(*STAGNANT)) for step in (100, 200, 300, 399, 400, 500)]
    state, decisions = run(config, path)
    assert grows(decisions) == [False] * 5 + [True]
    assert "warmup_steps" in decisions[0].reason
    assert state.stagnation == 2


def test_too_few_snapshots_are_named_and_reset_the_counter() -> None:
    config = GrowthConfig(warmup_steps=0)
    state, decision = decide(config, TriggerState(stagnation=4), observe(10, num_snapshots=2))
    assert (state.stagnation, decision.grow) == (0, False)
    assert "2 snapshots in the window, 3 are needed" in decision.reason


def test_geometric_waits_while_validation_still_improves() -> None:
    config = GrowthConfig(pg_patience=2, pg_threshold=0.1, warmup_steps=0)
    losses = [4.0, 3.9, 3.5, 3.0, 2.95, 2.9]
    _, decisions = run(config, [observe(s, x, measured(*STAGNANT)) for s, x in enumerate(losses)])
    # best of the last two against the best before: 3.5/4, 3.0/3.9, 2.95/3.5, 2.9/3.0
    assert grows(decisions) == [False, False, False, False, False, True]
    assert "improved by 3.33%" in decisions[-1].reason


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20), st.integers(1, 6))
def test_relative_improvement_is_best_of_recent_against_best_before(
    losses: list[float], patience: int
) -> None:
    improvement = relative_improvement(tuple(losses), patience)
    if len(losses) <= patience:
        assert improvement is None
        return
    assert improvement is not None
    before, recent = min(losses[: len(losses) - patience]), min(losses[len(losses) - patience :])
    assert improvement * before == pytest.approx(before - recent, abs=1e-9)
    assert (improvement > 0) == (recent < before)


def test_plateau_goes_by_the_loss_alone() -> None:
    config = GrowthConfig(trigger="plateau", pg_patience=2, pg_threshold=0.05, warmup_steps=3)
    losses = [4.0, 3.0, 2.9, 2.89, 2.88, 2.0]
    state, decisions = run(config, [observe(step, loss) for step, loss in enumerate(losses)])
    assert grows(decisions) == [False, False, False, True, True, False]
    assert state.eval_losses == tuple(losses)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("trigger", sorted(TRIGGERS))
def test_a_diverged_model_never_grows(trigger, loss: float) -> None:
    config = GrowthConfig(trigger=trigger, pg_patience=1, pg_threshold=1.0, warmup_steps=0)
    due = TriggerState(due_steps=(1, 2))
    state, _ = decide(config, due, observe(10, 3.0, measured(*STAGNANT)))
    state, decision = decide(config, state, observe(20, loss, measured(*STAGNANT)))
    assert not decision.grow
    assert "validation loss is" in decision.reason
    assert (state.stagnation, state.eval_losses) == (0, (3.0,))


def test_fixed_grows_at_its_fractions() -> None:
    config = GrowthConfig(trigger="fixed", growth_fractions=(0.2, 0.5), grow_by="double")
    state = TriggerState.start(config, depth=3, final_depth=12, total_steps=1000, seed=0)
    assert state.due_steps == (200, 500)
    steps = []
    for step in range(0, 1001, 50):
        state, decision = decide(config, state, observe(step, total_steps=1000, final_depth=12, metrics=None))
        if decision.grow:
            steps.append(step)
            state = state.after_growth(step)
    # The report's protocol would not end before the run does after a growth at 600 or later; 500 is in time.
    assert steps == [200, 500]
    assert state.next_due_step is None


def test_fixed_plans_no_more_growths_than_the_depth_allows() -> None:
    config = GrowthConfig(trigger="fixed", growth_fractions=(0.2, 0.5, 0.7), grow_to=(6, 12))
    assert TriggerState.start(config, depth=3, final_depth=12, total_steps=10, seed=0).due_steps == (2, 5)


@pytest.mark.parametrize("trigger", ["geometric", "plateau"])
@pytest.mark.parametrize("metrics", [None, (0.1, 0.1)])
def test_a_trigger_that_never_fires_grows_at_its_deadlines(trigger, metrics: tuple | None) -> None:
    config = GrowthConfig(
        trigger=trigger, deadline_fractions=(0.5, 0.7), grow_by="double", protocol="none", pg_threshold=1e-9
    )
    state = TriggerState.start(config, depth=3, final_depth=12, total_steps=1000, seed=0)
    shown = None if metrics is None else measured(*metrics)
    found = []
    for step in range(0, 1001, 50):
        observed = observe(step, 2000.0 - step, shown, total_steps=1000, final_depth=12)
        state, decision = decide(config, state, observed)
        if decision.grow:
            assert "due at the latest at step" in decision.reason
            found.append(step)
            state = state.after_growth(step)
    assert found == [500, 700]


def test_a_growth_that_came_early_leaves_the_next_deadline_where_it_was() -> None:
    config = GrowthConfig(deadline_fractions=(0.5, 0.7), warmup_steps=0, pg_patience=1, pg_threshold=1.0)
    state = TriggerState.start(config, depth=3, final_depth=12, total_steps=1000, seed=0)
    state, _ = decide(config, state, observe(50, total_steps=1000, metrics=measured(*STAGNANT)))
    state, decision = decide(config, state, observe(100, total_steps=1000, metrics=measured(*STAGNANT)))
    assert decision.grow
    assert "at the latest" not in decision.reason
    state = state.after_growth(100)
    assert state.next_due_step == 700
    assert not decide(config, state, observe(600, total_steps=1000, metrics=measured(0.1, 0.1)))[1].grow


def test_deadlines_mean_nothing_to_other_triggers() -> None:
    config = GrowthConfig(trigger="never", deadline_fractions=(0.5,))
    assert TriggerState.start(config, depth=3, final_depth=12, total_steps=10, seed=0).due_steps == ()
    fixed = GrowthConfig(trigger="fixed", growth_fractions=(0.2,), deadline_fractions=(0.5,))
    assert TriggerState.start(fixed, depth=3, final_depth=12, total_steps=10, seed=0).due_steps == (2,)


def test_random_draws_its_steps_once_from_the_seed() -> None:
    config = GrowthConfig(trigger="random", warmup_steps=100, latest_growth=0.8, grow_by=1)
    start = {"depth": 1, "final_depth": 4, "total_steps": 1000}
    states = [TriggerState.start(config, **start, seed=seed) for seed in range(200)]
    assert states[0] == TriggerState.start(config, **start, seed=0)
    drawn = [step for state in states for step in state.due_steps]
    assert all(
        len(state.due_steps) == 3 and list(state.due_steps) == sorted(state.due_steps) for state in states
    )
    assert 100 <= min(drawn) < 115
    assert 785 < max(drawn) <= 800
    assert sum(drawn) / len(drawn) == pytest.approx(450, abs=40)  # uniform on 100..800


def test_never_never_grows() -> None:
    config = GrowthConfig(trigger="never", warmup_steps=0, pg_patience=1)
    _, decisions = run(config, [observe(s, metrics=measured(9, 9)) for s in range(5)])
    assert not any(grows(decisions))


@pytest.mark.parametrize("trigger", sorted(set(TRIGGERS) - {"never"}))
@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({"depth": 6}, {}, "final depth of 6"),
        ({"depth": 4}, {"grow_to": (4,)}, "final depth of 4"),
        ({"step": 8_001}, {}, "latest_growth"),
        ({"step": 9_700}, {"latest_growth": 1.0}, "isolated warm-up"),
        ({"step": 8_000}, {}, None),
        ({"step": 9_700}, {"latest_growth": 1.0, "protocol": "none"}, None),
    ],
)
def test_limits_hold_for_every_trigger(trigger, changes: dict, settings: dict, reason: str | None) -> None:
    at_once = {"pg_patience": 1, "pg_threshold": 1.0, "warmup_steps": 0, "lag_interval": 1}
    config = GrowthConfig(trigger=trigger, **at_once, **settings)
    state = TriggerState(eval_losses=(3.0, 3.0), due_steps=(1,))
    _, decision = decide(config, state, observe(**{"step": 500, "metrics": measured(*STAGNANT), **changes}))
    assert decision.grow == (reason is None)
    assert reason is None or reason in decision.reason


def test_after_a_growth_counters_and_losses_start_again() -> None:
    state = TriggerState(stagnation=5, eval_losses=(3.0, 2.0), growth_steps=(10,), due_steps=(10, 20, 30))
    after = state.after_growth(20)
    assert (after.stagnation, after.eval_losses, after.growth_steps) == (0, (), (10, 20))
    assert (after.num_growths, after.next_due_step) == (2, 30)
    assert TriggerState.from_dict(json.loads(json.dumps(after.to_dict()))) == after


@pytest.mark.parametrize("total_steps", [7, 99, 100, 999, 1000, 1001, 12_345])
def test_a_growth_at_the_latest_moment_is_in_time(total_steps: int) -> None:
    for fraction in (0.07, 0.29, 0.57, 0.8):
        config = GrowthConfig(
            trigger="fixed", growth_fractions=(fraction,), latest_growth=fraction, protocol="none"
        )
        state = TriggerState.start(config, depth=3, final_depth=6, total_steps=total_steps, seed=0)
        due = state.due_steps[0]
        assert due == pytest.approx(fraction * total_steps, abs=1)
        assert decide(config, state, observe(due, total_steps=total_steps))[1].grow
        assert not decide(config, state, observe(due + 1, total_steps=total_steps))[1].grow


@pytest.mark.parametrize(
    ("settings", "total_steps", "warning"),
    [
        ({}, 10_000, None),
        (
            {},
            400,
            "could be at step 400, and its warm-up would outlast the run",
        ),
        ({"protocol": "none"}, 499, "the first growth could be at step 400, the last at 399"),
        ({"protocol": "none"}, 500, None),
        ({"warmup_steps": 0}, 700, "first growth could be at step 300, the last at 299"),
        ({"trigger": "plateau", "init": "copy", "warmup_steps": 0}, 402, None),
        ({"trigger": "plateau", "warmup_steps": 0}, 2000, "fewer than 3 snapshots"),
        ({"trigger": "fixed", "growth_fractions": (0.7,)}, 1000, "cannot grow in 1000 steps"),
        ({"trigger": "fixed", "growth_fractions": (0.2,)}, 1000, "a growth at step 200 would find fewer"),
        ({"trigger": "fixed", "growth_fractions": (0.2,), "init": "copy"}, 1000, None),
        ({"trigger": "random"}, 600, "cannot grow"),
        ({"trigger": "never"}, 1, None),
    ],
)
def test_what_the_budget_rules_out_is_said_beforehand(
    settings: dict, total_steps: int, warning: str | None
) -> None:
    config = GrowthConfig(**settings)
    config.validate()
    warnings = growth_warnings(config, total_steps=total_steps)
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"max_layers": 12, "grow_by": "double"}, "at which 1 layers become 4, not the planned 12: give 4"),
        ({"max_layers": 4, "grow_by": "double"}, None),
        ({"max_layers": 12, "grow_to": (3, 12)}, None),
        ({"grow_by": 1}, None),
    ],
)
def test_fixed_times_that_do_not_lead_to_the_planned_depth_are_told(
    settings: dict, warning: str | None
) -> None:
    config = GrowthConfig(trigger="fixed", init="copy", growth_fractions=(0.5, 0.7), **settings)
    warnings = growth_warnings(config, total_steps=1000, depth=1)
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]
