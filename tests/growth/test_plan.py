from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.growth.modules import Classifier

from aiether.growth import (
    PLACEMENTS,
    Family,
    GrowthConfig,
    GrowthPlan,
    LayerOrigin,
    depth_of,
    depth_schedule,
    frontier,
    next_depth,
    plan_growth,
    planned_depth,
)
from aiether.growth.config import Initialiser

BUILDERS = {
    "stack": GrowthPlan.stack,
    "interleave": GrowthPlan.interleave,
    "top": GrowthPlan.top,
    "front": GrowthPlan.front,
}


@pytest.mark.parametrize(
    ("placement", "depth", "to_layers", "layers"),
    [
        ("stack", 3, 6, "0 1 2 +0 +1 +2"),
        ("stack", 3, 7, "0 1 2 +0 +1 +2 +0"),
        ("stack", 1, 3, "0 +0 +0"),
        ("interleave", 3, 6, "0 +0 1 +1 2 +2"),
        ("interleave", 3, 5, "0 +0 1 +1 2"),
        ("interleave", 3, 12, "0 +0 +0 +0 1 +1 +1 +1 2 +2 +2 +2"),
        ("top", 3, 5, "0 1 2 +2 +2"),
        ("front", 3, 4, "+0 0 1 2"),
        ("front", 3, 6, "+0 +0 +0 0 1 2"),
    ],
)
def test_placement_puts_each_layer_where_it_says(
    placement: str, depth: int, to_layers: int, layers: str
) -> None:
    plan = BUILDERS[placement](depth, to_layers)
    assert plan.describe() == f"{depth} -> {to_layers} layers ({placement}, copy): {layers}"


@given(st.sampled_from(sorted(PLACEMENTS)), st.integers(1, 12), st.integers(1, 30))
def test_every_plan_keeps_each_old_layer_once_and_in_order(placement: str, depth: int, added: int) -> None:
    plan = BUILDERS[placement](depth, depth + added, "noise")
    assert plan.depth_after == depth + added
    assert list(plan.old_to_new) == list(range(depth))
    assert sorted(plan.old_to_new.values()) == list(plan.old_to_new.values())
    assert set(plan.old_to_new.values()).isdisjoint(plan.new_layers)
    assert len(plan.new_layers) == added
    assert all(0 <= origin.source < depth for origin in plan.layers)
    assert GrowthPlan.from_dict(plan.to_dict()) == plan


def test_a_growth_keeps_the_new_layers_beside_the_frontier() -> None:
    front, top = GrowthPlan.front(4, 5), GrowthPlan.top(4, 5)
    assert front.old_to_new[frontier("front", 4)] == front.new_layers[0] + 1
    assert top.old_to_new[frontier("top", 4)] == top.new_layers[0] - 1
    assert {frontier(p, 4) for p in ("stack", "interleave")} == {3}


@pytest.mark.parametrize("builder", BUILDERS.values())
@pytest.mark.parametrize("to_layers", [0, 2, 3])
def test_a_plan_that_adds_nothing_is_refused(
    builder: Callable[[int, int], GrowthPlan], to_layers: int
) -> None:
    with pytest.raises(ValueError, match="ask for more layers"):
        builder(3, to_layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(0, False), (1, False)], "adds no layer"),
        ([(1, False), (0, False), (0, True)], "once and in order"),
        ([(0, False), (0, True)], "once and in order"),
        ([(0, False), (1, False), (2, True)], "does not exist"),
        ([(0, False), (1, False), (-1, True)], "does not exist"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(layers: list[tuple[int, bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowthPlan(2, tuple(LayerOrigin(*layer) for layer in layers), "copy", "stack")


def test_unknown_initialiser_and_placement_are_refused_by_name() -> None:
    plan = GrowthPlan.stack(2, 3)
    with pytest.raises(ValueError, match="geometric, copy, zero"):
        dataclasses.replace(plan, init="net2net")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="stack, interleave"):
        dataclasses.replace(plan, placement="middle")  # pyright: ignore[reportArgumentType]


def test_depth_is_read_from_numbers_models_and_configurations(make_model) -> None:
    for model_type in ("gpt2", "llama"):
        model = make_model(model_type, 2)
        assert {depth_of(2), depth_of(model), depth_of(model.config), depth_of(model.config.to_dict())} == {2}
        assert GrowthPlan.stack(model, 4).depth_before == 2


def test_an_explicit_plan_names_every_layer() -> None:
    plan = GrowthPlan.explicit(3, ["+0", 0, 1, "+2", 2, LayerOrigin(1, True)], "noise")
    assert str(plan) == "3 -> 6 layers (explicit, noise): +0 0 1 +2 2 +1"
    assert plan.new_layers == (0, 3, 5)
    assert GrowthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="once and in order"):
        GrowthPlan.explicit(3, [0, 2, 1, "+1"])
    with pytest.raises(ValueError, match="adds no layer"):
        GrowthPlan.explicit(2, [0, 1])
    for layer in ("new", "-1", -1, "++1"):
        with pytest.raises(ValueError, match="write 2 for old layer 2"):
            GrowthPlan.explicit(2, [0, 1, layer])


def test_new_layers_may_have_coefficients_of_their_own() -> None:
    plan = GrowthPlan.top(2, 4, "geometric").with_gains({2: {"beta0": 0.2}, 3: {"eta0": 0.0, "gamma0": 0.1}})
    assert str(plan) == "2 -> 4 layers (top, geometric): 0 1 +1 (beta0=0.2) +1 (gamma0=0.1, eta0=0)"
    assert GrowthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.to_dict()["layers"][0] == {"source": 0, "is_new": False}
    assert plan.with_gains({2: {"gamma0": 0.3}}).layers[2].gains == {"beta0": 0.2, "gamma0": 0.3}


@pytest.mark.parametrize(
    ("init", "gains", "message"),
    [
        ("geometric", {0: {"beta0": 0.2}}, r"for layer 0: give .* for new layers \(2, 3\)"),
        ("geometric", {2: {"tau_crit": 0.2}}, "give beta0, gamma0, eta0"),
        ("geometric", {2: {"beta0": -0.2}}, "beta0 of layer 2 is -0.2: it must be 0 or greater"),
        ("geometric", {2: {"beta0": float("nan")}}, "must be 0 or greater"),
        ("copy", {2: {"beta0": 0.2}}, "for init 'geometric' \\(this plan's is 'copy'\\)"),
    ],
)
def test_coefficients_that_would_do_nothing_or_harm_are_refused(
    init: Initialiser, gains: dict[int, dict[str, float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GrowthPlan.top(2, 4, init).with_gains(gains)


def test_a_module_without_a_configuration_has_the_depth_of_its_list() -> None:
    model = Classifier(3)
    assert GrowthPlan.stack(model, 5).depth_before == 3
    family = Family(blocks="encoder.layers", output_projections=("mix", "out"))
    assert GrowthPlan.interleave(model, 5, family=family) == GrowthPlan.interleave(3, 5)


@pytest.mark.parametrize(
    ("settings", "depth", "final", "schedule"),
    [
        ({"grow_by": 1}, 3, 6, (4, 5, 6)),
        ({"grow_by": 4}, 3, 9, (7, 9)),
        ({"grow_by": "double"}, 3, 12, (6, 12)),
        ({"grow_by": "double"}, 3, 10, (6, 10)),
        ({"grow_by": "max"}, 3, 12, (12,)),
        ({"grow_to": (5, 8)}, 3, 12, (5, 8)),
        ({"grow_to": (2, 5, 8)}, 3, 7, (5,)),
        ({"grow_by": "max", "grow_to": (4,)}, 3, 12, (4,)),
        ({"grow_by": 1}, 6, 6, ()),
    ],
)
def test_depths_to_come(settings: dict, depth: int, final: int, schedule: tuple[int, ...]) -> None:
    config = GrowthConfig(**settings)
    assert depth_schedule(config, depth, final_depth=final) == schedule
    assert next_depth(config, depth, final_depth=final) == (schedule[0] if schedule else None)
    plan = plan_growth(config, depth, final_depth=final)
    assert (plan.depth_after if plan else None) == (schedule[0] if schedule else None)
    if plan:
        assert (plan.placement, plan.init) == (config.placement, config.init)


@pytest.mark.parametrize(
    ("settings", "final"),
    [
        ({"max_layers": 7}, 7),
        ({"grow_to": (4, 9)}, 9),
        ({"grow_to": (2,)}, 3),
        ({"trigger": "never"}, 3),
        ({"trigger": "never", "max_layers": 12}, 12),
        ({}, 6),
    ],
)
def test_planned_depth(settings: dict, final: int) -> None:
    assert planned_depth(GrowthConfig(**settings), 3) == final


def test_planned_depth_refuses_a_model_that_is_deeper_already() -> None:
    with pytest.raises(ValueError, match="raise max_layers"):
        planned_depth(GrowthConfig(max_layers=2), 3)


@pytest.mark.parametrize("to_layers", [4.0, True, "4", None])
def test_layers_to_grow_to_that_are_no_whole_number_are_refused(to_layers: object) -> None:
    with pytest.raises(ValueError, match=r"to_layers is .*number of layers to grow to"):
        GrowthPlan.stack(2, to_layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [True, 2.0, 0, -1])
def test_a_number_of_layers_that_is_none_is_refused(source: object) -> None:
    with pytest.raises(ValueError, match="is no number of layers: give a model"):
        GrowthPlan.stack(source, 4)
