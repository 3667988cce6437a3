from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.growth import GrowthPlan, Lineage


def test_births_are_recorded_in_the_order_of_the_layers() -> None:
    lineage = (
        Lineage.start(2)
        .grow(GrowthPlan.front(2, 3, "geometric"), 40)
        .grow(GrowthPlan.stack(3, 6, "copy"), 90)
    )
    assert [record.id for record in lineage.records] == [2, 0, 1, 3, 4, 5]
    assert [record.parent for record in lineage.records] == [0, None, None, 2, 0, 1]
    assert [record.born_step for record in lineage.records] == [40, 0, 0, 90, 90, 90]
    assert [record.init for record in lineage.records] == [
        "geometric",
        "random",
        "random",
        "copy",
        "copy",
        "copy",
    ]
    assert [record.placement for record in lineage.records] == ["front", "initial", "initial", *["stack"] * 3]


@given(
    st.lists(
        st.tuples(st.sampled_from(["stack", "interleave", "top", "front"]), st.integers(1, 5)), max_size=5
    )
)
def test_ids_are_unique_and_stay_with_their_layer(growths: list[tuple[str, int]]) -> None:
    lineage = Lineage.start(2)
    for step, (placement, added) in enumerate(growths, 1):
        plan = getattr(GrowthPlan, placement)(lineage.depth, lineage.depth + added)
        before, lineage = lineage, lineage.grow(plan, step)
        assert [lineage.records[new] for new in plan.old_to_new.values()] == list(before.records)
        born = [record for record in lineage.records if record.born_step == step]
        assert {record.parent for record in born} == {before.records[source].id for source in plan.sources}
    ids = [record.id for record in lineage.records]
    assert sorted(ids) == list(range(len(ids)))
    assert Lineage.from_dict(json.loads(json.dumps(lineage.to_dict()))) == lineage


def test_a_plan_for_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="plan is for 3 layers, the lineage has 2"):
        Lineage.start(2).grow(GrowthPlan.stack(3, 4), 1)
