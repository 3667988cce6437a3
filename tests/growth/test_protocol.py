from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.growth import GrowthConfig, GrowthPlan, Phases

PLANS = {
    "front": GrowthPlan.front(3, 4),
    "top": GrowthPlan.top(3, 5),
    "stack": GrowthPlan.stack(3, 6),
    "interleave": GrowthPlan.interleave(3, 6),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_at_once_only_new_layers_warm_up_and_then_everything_trains(plan: GrowthPlan) -> None:
    phases = Phases.after(plan, 100, GrowthConfig(isolated_warmup_steps=40, isolated_lr_scale=0.1))
    assert all(phases.trainable(step) == set(plan.new_layers) for step in (100, 139))
    assert phases.trainable(140) is None
    assert (phases.end, phases.boundaries()) == (140, (140,))


def test_gradual_unfreezes_the_nearest_layers_first() -> None:
    config = GrowthConfig(isolated_warmup_steps=40, unfreeze="gradual", unfreeze_interval_steps=10)
    phases = Phases.after(GrowthPlan.front(3, 4), 100, config)
    assert phases.trainable(139) == {0}
    assert phases.trainable(140) == {0, 1}
    assert phases.trainable(149) == {0, 1}
    assert phases.trainable(150) == {0, 1, 2}
    assert phases.trainable(159) == {0, 1, 2}
    assert phases.trainable(160) is None  # the last layer, and with it embeddings, norm and head
    assert phases.boundaries() == (140, 150, 160)


@given(
    st.sampled_from(sorted(PLANS)),
    st.sampled_from(["at_once", "gradual"]),
    st.integers(0, 30),
    st.integers(1, 20),
    st.integers(0, 500),
)
def test_the_trainable_set_only_grows_and_changes_at_boundaries_alone(
    placement: str, unfreeze, warmup: int, interval: int, start: int
) -> None:
    plan = PLANS[placement]
    config = GrowthConfig(isolated_warmup_steps=warmup, unfreeze=unfreeze, unfreeze_interval_steps=interval)
    phases = Phases.after(plan, start, config)
    everything = frozenset(range(plan.depth_after))
    sets = [phases.trainable(step) for step in range(start, phases.end + 2)]
    assert sets[-1] is None
    changes = set()
    for offset, (before, after) in enumerate(itertools.pairwise(sets), 1):
        assert (before or everything) <= (after or everything)
        if before != after:
            changes.add(start + offset)
    assert changes <= set(phases.boundaries())
    if warmup:
        assert sets[0] == set(plan.new_layers)
        assert changes == set(phases.boundaries())
    assert Phases.from_dict(json.loads(json.dumps(asdict(phases)))) == phases
