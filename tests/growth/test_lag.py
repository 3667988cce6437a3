from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.growth import Candidate, GrowthConfig, GrowthController, Trial, family_of, trial_steps
from aiether.growth.lag import candidates, verdict

LOSSES = st.one_of(st.floats(0.1, 9.0), st.sampled_from([math.nan, math.inf]))


def controller(**settings: Any) -> GrowthController:
    config = GrowthConfig(**{"trigger": "lag", "warmup_steps": 0, "lag_interval": 1, **settings})
    return GrowthController(config, family_of("gpt2"), depth=2, total_steps=10_000, seed=0, final_depth=8)


def trial(loss: float) -> Trial:
    return Trial(steps=2, flops=10, seconds=0.5, eval_loss=loss)


def names(**settings: Any) -> list[str]:
    config = GrowthConfig(**{"placement": "stack", "init": "copy", **settings})
    return [candidate.name for candidate in candidates(config, 2, final_depth=4)]


def test_lag_tries_staying_and_the_configured_growth_or_the_listed_ones() -> None:
    assert names(trigger="lag") == ["stay", "stack/copy"]
    listed = {"lag_candidates": ("interleave/zero", "top/noise")}
    assert names(trigger="lag", **listed) == ["stay", "interleave/zero", "top/noise"]
    assert names(trigger="fixed", **listed) == ["interleave/zero", "top/noise"]
    assert candidates(GrowthConfig(trigger="lag"), 4, final_depth=4) == ()


def test_all_that_grow_reach_the_same_depth() -> None:
    config = GrowthConfig(trigger="lag", grow_to=(5,), lag_candidates=("stack/copy", "front/zero"))
    stay, *grown = candidates(config, 2, final_depth=5)
    assert stay.plan is None
    assert [plan.depth_after for candidate in grown if (plan := candidate.plan)] == [5, 5]


@given(st.integers(1, 500), st.lists(st.integers(1, 10**15), min_size=1, max_size=5))
def test_every_fork_spends_what_the_dearest_does_to_a_step(lag_steps: int, flops: list[int]) -> None:
    steps, dearest = trial_steps(lag_steps, flops), lag_steps * max(flops)
    assert steps[flops.index(max(flops))] == lag_steps
    assert all((n - 1) * cost < dearest <= n * cost for n, cost in zip(steps, flops, strict=True))


@given(st.lists(LOSSES, min_size=3, max_size=3))
def test_the_choice_follows_the_losses(losses: list[float]) -> None:
    config = GrowthConfig(trigger="lag", lag_candidates=("stack/copy", "interleave/zero"))
    tried = candidates(config, 2, final_depth=4)
    name, decision = verdict(tried, [trial(loss) for loss in losses])
    finite = [loss for loss in losses if math.isfinite(loss)]
    expected = tried[losses.index(min(finite))] if finite else tried[0]
    assert name == expected.name
    assert decision.plan == expected.plan
    assert decision.grow == (expected.plan is not None)


def test_a_form_is_not_chosen_where_every_fork_diverged() -> None:
    config = GrowthConfig(trigger="fixed", lag_candidates=("stack/copy", "interleave/zero"))
    tried = candidates(config, 2, final_depth=4)
    assert not verdict(tried, [trial(math.nan), trial(math.inf)])[1].grow
    assert json.loads(json.dumps(trial(math.inf).to_dict()))["eval_loss"] is None


def test_a_probe_is_due_at_every_so_many_evaluations() -> None:
    growing = controller(lag_interval=3, warmup_steps=40)
    asked = {step: growing.evaluate(step, 3.0) for step in range(10, 101, 10)}
    assert [step for step, decision in asked.items() if decision.probe] == [60, 90]
    assert not any(decision.grow or decision.plan for decision in asked.values())
    assert "a probe is due after 9" in asked[70].reason


def test_no_probe_outlasts_the_run() -> None:
    growing = controller(latest_growth=1.0, protocol="none", lag_steps=100, grow_by="double")
    assert growing.evaluate(9_799, 3.0).probe  # staying may take twice as many steps as growing
    late = growing.evaluate(9_800, 3.0)
    assert not late.probe
    assert "lag_steps" in late.reason


def test_other_triggers_probe_the_form_of_a_growth_that_is_decided() -> None:
    growing = controller(trigger="fixed", growth_fractions=(0.2,), lag_candidates=("stack/copy", "top/copy"))
    assert not growing.evaluate(1_999, 3.0).probe
    assert growing.evaluate(2_000, 3.0).probe
    name, decision = growing.settle(growing.candidates(), [trial(3.0), trial(2.0)])
    assert (name, decision.grow) == ("top/copy", True)
    assert decision.plan == growing.candidates()[1].plan


def test_a_fork_follows_the_protocol_and_leaves_the_run_alone() -> None:
    growing = controller(placement="stack", grow_by="double", init="copy", isolated_warmup_steps=50)
    before = growing.state_dict()
    fork = growing.fork(growing.candidates()[1].plan, 100)
    assert (fork.depth, fork.newest_layers(), fork.trainable(100)) == (4, (2, 3), frozenset({2, 3}))
    assert fork.trajectory is not growing.trajectory
    assert growing.fork(None, 100).state_dict() == before == growing.state_dict()


def test_sources_of_every_geometric_candidate_are_watched() -> None:
    listed = ("top/geometric", "stack/copy")
    assert controller(lag_candidates=listed).watched_layers() == {1}
    assert controller(lag_candidates=("stack/geometric", *listed)).watched_layers() == {0, 1}
    assert controller(lag_candidates=("stack/copy",)).watched_layers() == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lag_candidates": ("stack",)}, "'stack': a placement"),
        ({"lag_candidates": ("stack/copied",)}, "geometric, copy"),
        ({"lag_candidates": ("explicit/copy",)}, "stack, interleave"),
        ({"lag_candidates": ("stack/copy", "stack/copy")}, "once"),
        ({"lag_steps": 0}, "lag_steps is 0"),
        ({"lag_interval": 0}, "lag_interval is 0"),
        ({"trigger": "lag", "isolated_warmup_steps": 19}, "protocol 'none'"),
    ],
)
def test_what_cannot_be_tried_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowthConfig(**settings).validate()


def test_staying_has_a_name() -> None:
    assert Candidate(plan=None).name == "stay"
