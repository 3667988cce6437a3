from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from aiether.geometry import velocity_gram
from aiether.geometry.metrics import metrics_from_gram
from aiether.growth import (
    GrowthConfig,
    GrowthController,
    GrowthPlan,
    Lineage,
    TrainingState,
    block_tensors,
    family_of,
)

FAMILY = family_of("gpt2")
SUFFIXES = {
    "ln_1.weight": (4,),
    "attn.c_attn.weight": (4, 12),
    "attn.c_proj.weight": (4, 4),
    "mlp.c_proj.weight": (4, 4),
}


def fake_state(depth: int, seed: int = 0) -> TrainingState:
    """A training state with the names of a GPT-2 and a few tensors a block: a controller needs no model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {FAMILY.name(layer, s): shape for layer in range(depth) for s, shape in SUFFIXES.items()}
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"transformer.wte.weight": (8, 4), **shapes}.items()
    }
    moments: Any = {
        name: {"exp_avg": torch.randn(t.shape, generator=generator), "step": 3} for name, t in tensors.items()
    }
    return TrainingState(config={"model_type": "gpt2", "n_layer": depth}, tensors=tensors, moments=moments)


def controller(
    depth: int = 2, total_steps: int = 1000, final_depth: int = 8, **settings: Any
) -> GrowthController:
    defaults = {"collect_interval_steps": 10, "history_window_size": 5, "warmup_steps": 0, "pg_patience": 2}
    config = GrowthConfig(**{**defaults, **settings})
    return GrowthController(
        config, FAMILY, depth=depth, total_steps=total_steps, seed=5, final_depth=final_depth
    )


def wander(state: TrainingState, step: int, layers: frozenset[int] | None) -> None:
    """One step of a random walk on the layers that train; a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    for name, tensor in state.tensors.items():
        parts = FAMILY.split(name)
        noise = torch.randn(tensor.shape, generator=generator) * 0.01
        if layers is None or (parts and parts[0] in layers):
            tensor.add_(noise)


class Run:
    """A plain loop around a controller, as a driver would write it."""

    def __init__(self, growth: GrowthController, depth: int) -> None:
        self.growth, self.state, self.log = growth, fake_state(depth), []

    def step(self, step: int) -> None:
        wander(self.state, step, self.growth.trainable(step - 1))
        if self.growth.wants_snapshot(step):
            self.growth.snapshot(step, self.state.tensors)
        if step % 10 and not self.growth.wants_evaluation(step):
            return
        decision = self.growth.evaluate(step, 3 - 1e-5 * step, self.growth.depth)
        self.log.append((step, decision, dict(self.growth.last_metrics)))
        if decision.plan:
            current = TrainingState(
                config=self.state.config, tensors=self.state.tensors, moments=self.state.moments, step=step
            )
            self.state = self.growth.grow(current, decision.plan).state


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


SETTINGS: dict[str, dict[str, Any]] = {
    "report": {"isolated_warmup_steps": 30},
    "gradual": {
        "isolated_warmup_steps": 20,
        "unfreeze": "gradual",
        "unfreeze_interval_steps": 7,
        "grow_by": 2,
    },
    "stack": {
        "placement": "stack",
        "grow_by": "double",
        "protocol": "none",
        "watch": "all",
        "thresholds": "normalised",
    },
    "random": {
        "trigger": "random",
        "init": "noise",
        "placement": "interleave",
        "protocol": "none",
        "warmup_steps": 40,
    },
    "fixed": {
        "trigger": "fixed",
        "growth_fractions": (0.13, 0.6),
        "placement": "top",
        "isolated_warmup_steps": 25,
    },
    "host": {"snapshot_storage": "host", "protocol": "none"},
    "disk": {"snapshot_storage": "disk", "protocol": "none"},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_restored_controller_continues_bit_equal(name: str, tmp_path) -> None:
    def fresh() -> GrowthController:
        return controller(
            total_steps=300, tau_crit=0.5, kappa_crit=0.3, **{"pg_patience": 2, **SETTINGS[name]}
        )

    whole = Run(fresh(), 2)
    cut_points, saved = (0, 47, 60, 95, 101, 133, 200), {}
    for step in range(301):
        if step:
            whole.step(step)
        if step in cut_points:
            window = whole.growth.trajectory
            snapshots = {s: {n: t.clone() for n, t in window.snapshot_items(s).items()} for s in window.steps}
            tensors = {n: t.clone() for n, t in whole.state.tensors.items()}
            saved[step] = (
                through_json(whole.growth.state_dict()),
                snapshots,
                tensors,
                dict(whole.state.config),
            )
    assert whole.growth.num_growths >= 2
    for cut, (state, snapshots, tensors, config) in saved.items():
        resumed = Run(fresh(), 2)
        resumed.growth.load_state_dict(state, snapshots.__getitem__)
        resumed.state = TrainingState(config=config, tensors={n: t.clone() for n, t in tensors.items()})
        for step in range(cut + 1, 301):
            resumed.step(step)
        assert resumed.log == [entry for entry in whole.log if entry[0] > cut]
        assert equal(resumed.state.tensors, whole.state.tensors)
        assert through_json(resumed.growth.state_dict()) == through_json(whole.growth.state_dict())


def test_a_state_of_another_version_or_window_is_refused() -> None:
    state = controller().state_dict()
    with pytest.raises(ValueError, match="has version 99"):
        controller().load_state_dict({**state, "version": 99}, lambda _: {})
    with pytest.raises(ValueError, match="holds 5 snapshots, history_window_size is 7"):
        controller(history_window_size=7).load_state_dict(state, lambda _: {})


@pytest.mark.parametrize(
    ("settings", "depth", "layers"),
    [
        ({}, 3, {0}),  # front: the frontier is the lowest layer, and the source of the next one
        ({"placement": "top"}, 3, {2}),
        ({"placement": "stack", "grow_by": "double"}, 3, {0, 1, 2}),
        ({"placement": "stack", "grow_by": 1}, 3, {0, 2}),  # frontier 2, next source 0
        ({"placement": "stack", "init": "copy"}, 3, {2}),
        ({"watch": "all"}, 3, {0, 1, 2}),
        ({"watch": "all"}, 8, set(range(8))),  # the trigger's measurements go on at the final depth
        ({"trigger": "fixed"}, 3, {0}),
        ({"trigger": "fixed", "watch": "all"}, 3, {0}),
        ({"trigger": "fixed"}, 8, set()),
        ({"trigger": "fixed", "init": "copy"}, 3, set()),
        ({"trigger": "plateau", "init": "zero"}, 3, set()),
        ({"trigger": "never"}, 3, set()),
    ],
)
def test_only_what_is_needed_is_watched(settings: dict[str, Any], depth: int, layers: set[int]) -> None:
    growth, state = controller(depth=depth, **settings), fake_state(depth)
    assert growth.watched_layers() == layers
    assert growth.wants_snapshot(10) == bool(layers)
    assert not growth.wants_snapshot(11)
    if layers:
        growth.snapshot(10, state.tensors)
        blocks = block_tensors(growth.trajectory.names, FAMILY)
        assert set(blocks) == layers
        assert all(set(block) == set(SUFFIXES) for block in blocks.values())


def test_a_model_with_other_names_is_refused() -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in fake_state(2).tensors.items()}
    with pytest.raises(ValueError, match="unwrapped"):
        controller().snapshot(10, wrapped)


@pytest.mark.parametrize("watch", ["frontier", "all"])
def test_the_watched_layers_are_measured_as_one_point(watch: str) -> None:
    growth, state = controller(placement="top", watch=watch), fake_state(2)
    history = []
    for step in (10, 20, 30, 40):
        wander(state, step, None)
        growth.snapshot(step, state.tensors)
        names = [n for n in state.tensors if FAMILY.split(n) and (watch == "all" or ".h.1." in n)]
        history.append(torch.cat([state.tensors[name].flatten() for name in names]))
        if step < 30:
            growth.evaluate(step, 3.0)
            assert growth.last_metrics["tau"] is None
    growth.evaluate(40, 3.0)
    expected = metrics_from_gram(velocity_gram(history)).to_dict()
    assert expected.keys() <= growth.last_metrics.keys()
    assert {key: growth.last_metrics[key] for key in expected} == pytest.approx(expected)
    assert growth.last_metrics["stagnation"] == growth.trigger_state.stagnation
    assert growth.last_metrics["num_snapshots"] == 4


def test_growing_begins_a_new_stage() -> None:
    growth, state = (
        controller(tau_crit=0.1, kappa_crit=0.1, placement="stack", grow_by="double"),
        fake_state(2),
    )
    plans = []
    for step in (10, 20, 30, 40, 50):
        wander(state, step, None)
        growth.snapshot(step, state.tensors)
        plans.append(growth.evaluate(step, 3.0).plan)
    assert plans == [
        None,
        None,
        None,
        GrowthPlan.stack(2, 4, "geometric"),
        GrowthPlan.stack(2, 4, "geometric"),
    ]
    grown = TrainingState(config=state.config, tensors=state.tensors, moments=state.moments, step=50)
    migration = growth.grow(grown, GrowthPlan.stack(2, 4, "geometric"))
    assert all("fallback" not in entry for entry in migration.tensor_metrics.values())
    assert (growth.depth, growth.num_growths, len(growth.trajectory)) == (4, 1, 0)
    assert (growth.trigger_state.stagnation, growth.trigger_state.eval_losses) == (0, ())
    assert growth.lineage == Lineage.start(2).grow(migration.plan, 50)
    with pytest.raises(ValueError, match="model has 2 layers, the controller counts 4"):
        growth.evaluate(60, 3.0, depth=2)


def test_a_failed_migration_leaves_the_controller_as_it_was() -> None:
    growth, state = controller(), fake_state(3)
    growth.snapshot(10, state.tensors)
    before = through_json(growth.state_dict())
    with pytest.raises(ValueError, match="plan is for 2 layers"):
        growth.grow(state, GrowthPlan.front(2, 3, "geometric"))
    assert through_json(growth.state_dict()) == before


def test_the_reports_protocol() -> None:
    growth, state = controller(isolated_warmup_steps=40, isolated_lr_scale=0.1), fake_state(2)
    assert (growth.trainable(50), growth.lr_scale(50), growth.restart_step(50)) == (None, 1.0, None)
    assert growth.next_phase_step(50) is None
    grown = growth.grow(
        TrainingState(config=state.config, tensors=state.tensors, step=50), GrowthPlan.front(2, 3)
    )
    assert growth.next_phase_step(50) == 90
    for step in (50, 89):
        assert growth.trainable(step) == {0}
        assert growth.lr_scale(step) == 0.1
        assert growth.restart_step(step) is None
    assert not growth.wants_snapshot(80)
    decision = growth.evaluate(60, 3.0)
    assert "frozen until step 90" in decision.reason
    assert growth.trigger_state.eval_losses == ()
    assert (growth.trainable(90), growth.lr_scale(90), growth.restart_step(90)) == (None, 1.0, 90)
    assert growth.next_phase_step(90) is None
    assert growth.wants_snapshot(90)
    # A second growth freezes again and does not disturb the first restart before its own.
    second = TrainingState(config=grown.state.config, tensors=grown.state.tensors, step=200)
    growth.grow(second, GrowthPlan.front(3, 4))
    assert [growth.restart_step(step) for step in (89, 90, 239, 240)] == [None, 90, 90, 240]
    assert [growth.lr_scale(step) for step in (60, 150, 200, 240)] == [0.1, 1.0, 0.1, 1.0]
    assert [growth.next_phase_step(step) for step in (60, 150, 240)] == [90, 240, None]


def test_without_a_protocol_nothing_freezes_and_the_schedule_goes_on() -> None:
    growth, state = controller(protocol="none"), fake_state(2)
    growth.grow(TrainingState(config=state.config, tensors=state.tensors, step=50), GrowthPlan.front(2, 3))
    assert (growth.trainable(50), growth.lr_scale(50), growth.restart_step(900)) == (None, 1.0, None)
    assert growth.next_phase_step(0) is None


def test_growths_by_the_clock_ask_for_an_evaluation_on_their_step() -> None:
    run = Run(
        controller(trigger="fixed", growth_fractions=(0.133, 0.151), init="copy", isolated_warmup_steps=35), 2
    )
    asked = []
    for step in range(1, 400):
        asked += [step] if run.growth.wants_evaluation(step) else []
        run.step(step)
    # The second is due at 151, while layers are frozen: it takes place when they are free again.
    assert asked == [133, 168]
    assert run.growth.trigger_state.growth_steps == (133, 168)
    assert run.growth.depth == 4


def test_a_history_too_short_for_the_trigger_or_no_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="final_depth is 1"):
        controller(depth=2, final_depth=1)
    with pytest.raises(ValueError, match="trigger is 'maybe'"):
        controller(trigger="maybe")


def test_a_loss_that_is_not_a_number_never_grows() -> None:
    growth, state = controller(tau_crit=0.1, kappa_crit=0.1), fake_state(2)
    for step in range(10, 100, 10):
        wander(state, step, None)
        growth.snapshot(step, state.tensors)
        assert not growth.evaluate(step, math.nan).grow


def test_snapshots_are_copies() -> None:
    growth, state = controller(), fake_state(2)
    growth.snapshot(10, state.tensors)
    before = {name: tensor.clone() for name, tensor in growth.trajectory.snapshot_items(10).items()}
    for tensor in state.tensors.values():
        tensor.zero_()
    after: dict[str, Tensor] = growth.trajectory.snapshot_items(10)
    assert equal(after, before)


@pytest.mark.parametrize("trigger", ["fixed", "geometric"])
def test_a_dry_run_measures_and_decides_and_never_grows(trigger: str) -> None:
    settings: dict[str, Any] = {
        "trigger": trigger,
        "init": "copy",
        "growth_fractions": (0.1,),
        "protocol": "none",
    }
    settings |= {"tau_crit": 0.1, "kappa_crit": 0.1, "pg_threshold": 2.0}
    wet, dry = controller(**settings), controller(**settings, dry_run=True)
    state = fake_state(2)
    decisions = []
    for step in range(10, 151, 10):
        wander(state, step, None)
        for growth in (wet, dry):
            if growth.wants_snapshot(step):
                growth.snapshot(step, state.tensors)
        decisions.append((wet.evaluate(step, 3.0), dry.evaluate(step, 3.0)))
    assert any(wet.grow for wet, _ in decisions), "the trigger must have fired, or this shows nothing"
    for wanted, told in decisions:
        assert not told.grow
        assert told.plan is None
        assert ("dry run: the model would grow now" in told.reason) == wanted.grow
    assert dry.last_metrics["tau"] is not None
