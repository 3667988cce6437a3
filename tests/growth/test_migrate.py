"""One table, families x placements x initialisers, drives the properties that every growth has."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from aiether.growth import (
    INITIALISERS,
    PLACEMENTS,
    GrowthConfig,
    GrowthPlan,
    Migration,
    TrainingState,
    family_of,
    migrate,
    renames,
)
from aiether.growth.config import Initialiser, Placement

FAMILY_NAMES = ("gpt2", "llama")
TABLE = list(itertools.product(FAMILY_NAMES, sorted(PLACEMENTS), sorted(INITIALISERS)))
DEPTH, FINAL_DEPTH = 3, 12


def grown(
    trained: Any,
    model_type: str,
    placement: Placement,
    init: Initialiser,
    to_layers: int = 5,
    **settings: Any,
) -> tuple[TrainingState, Migration]:
    state, trajectory = trained(model_type, DEPTH)
    plan = GrowthPlan(DEPTH, PLACEMENTS[placement](DEPTH, to_layers), init, placement)
    growth = GrowthConfig(**settings)
    return state, migrate(state, plan, growth=growth, trajectory=trajectory, final_depth=FINAL_DEPTH, seed=0)


def new_names(migration: Migration) -> set[str]:
    family = family_of(migration.state.config)
    names = ((name, family.split(name)) for name in migration.state.tensors)
    return {name for name, parts in names if parts and parts[0] in migration.plan.new_layers}


def same_moments(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("model_type", "placement", "init"), TABLE)
def test_old_tensors_and_moments_are_bit_identical_under_their_new_names(
    trained, model_type: str, placement: Placement, init: Initialiser
) -> None:
    state, migration = grown(trained, model_type, placement, init)
    family, plan = family_of(model_type), migration.plan

    def moved(name: str) -> str:
        parts = family.split(name)
        return family.name(plan.old_to_new[parts[0]], parts[1]) if parts else name

    assert all(
        torch.equal(migration.state.tensors[moved(name)], state.tensors[name]) for name in state.tensors
    )
    assert all(same_moments(migration.state.moments[moved(n)], state.moments[n]) for n in state.moments)
    assert set(migration.state.tensors) - {moved(name) for name in state.tensors} == new_names(migration)
    assert new_names(migration) == set(migration.tensor_metrics)
    assert migration.state.step == state.step
    assert migration.state.extra == state.extra


@pytest.mark.parametrize(("model_type", "placement", "init"), TABLE)
def test_the_grown_state_is_a_whole_model_that_can_be_saved_and_loaded(
    trained, to_model, tmp_path, model_type: str, placement: Placement, init: Initialiser
) -> None:
    _, migration = grown(trained, model_type, placement, init)
    model = to_model(migration.state)
    assert model.config.num_hidden_layers == 5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        output = loaded(tokens, output_hidden_states=True, use_cache=False)
        assert len(output.hidden_states) == 6  # no layer is left out of the forward pass
        assert torch.isfinite(output.logits).all()
        assert torch.equal(output.logits, model(tokens, use_cache=False).logits)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in migration.state.tensors.items())


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_generation_with_the_cache_agrees_with_the_one_without(trained, to_model, model_type: str) -> None:
    _, migration = grown(trained, model_type, "stack", "noise", to_layers=6)
    model, prompt = to_model(migration.state), torch.tensor([[3, 7, 1]])
    cached, plain = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("model_type", "placement"), list(itertools.product(FAMILY_NAMES, sorted(PLACEMENTS)))
)
def test_zero_keeps_the_function(trained, to_model, model_type: str, placement: Placement) -> None:
    state, migration = grown(trained, model_type, placement, "zero", to_layers=6)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = to_model(state)(tokens, use_cache=False).logits
        after = to_model(migration.state)(tokens, use_cache=False).logits
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_zero_silences_the_output_projections_and_copies_the_rest(trained, model_type: str) -> None:
    state, migration = grown(trained, model_type, "top", "zero", to_layers=4)
    family = family_of(model_type)
    for name in new_names(migration):
        _, suffix = family.split(name) or (0, "")
        source, tensor = state.tensors[family.name(2, suffix)], migration.state.tensors[name]
        is_output = any(suffix.startswith(f"{module}.") for module in family.output_projections)
        assert torch.equal(tensor, torch.zeros_like(source) if is_output else source), name


@pytest.mark.parametrize(
    ("model_type", "placement"), list(itertools.product(FAMILY_NAMES, sorted(PLACEMENTS)))
)
def test_copies_come_from_the_layer_that_the_plan_names(
    trained, model_type: str, placement: Placement
) -> None:
    state, migration = grown(trained, model_type, placement, "copy", to_layers=8)
    family = family_of(model_type)
    for name in new_names(migration):
        layer, suffix = family.split(name) or (0, "")
        source = migration.plan.layers[layer].source
        assert torch.equal(migration.state.tensors[name], state.tensors[family.name(source, suffix)])
        assert migration.tensor_metrics[name]["source"] == source
        assert migration.tensor_metrics[name]["relative_change"] == 0


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("noise", [0.05, 0.2, 1.0])
def test_noise_has_the_asked_norm_on_matrices_and_spares_vectors(
    trained, model_type: str, noise: float
) -> None:
    state, migration = grown(trained, model_type, "stack", "noise", to_layers=6, noise=noise)
    family = family_of(model_type)
    differences = {}
    for name in new_names(migration):
        layer, suffix = family.split(name) or (0, "")
        source, tensor = state.tensors[family.name(layer - DEPTH, suffix)], migration.state.tensors[name]
        if tensor.ndim == 1:
            assert torch.equal(tensor, source)
            continue
        differences[name] = (tensor - source).flatten()
        ratio = float(torch.linalg.vector_norm(differences[name]) / torch.linalg.vector_norm(source))
        assert ratio == pytest.approx(noise, rel=1e-4)
        assert migration.tensor_metrics[name]["relative_change"] == pytest.approx(ratio, rel=1e-6)
    for first, second in itertools.combinations(differences.values(), 2):
        if first.shape == second.shape and first.numel() > 200:
            assert abs(float(torch.cosine_similarity(first, second, dim=0))) < 0.4  # no draw is used twice


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_random_is_the_models_own_initialisation_at_the_final_depth(make_model, model_type: str) -> None:
    sizes = {"n_embd": 96} if model_type == "gpt2" else {"hidden_size": 96, "intermediate_size": 128}
    model = make_model(model_type, 1, initializer_range=0.03, **sizes)
    state = TrainingState(config=model.config.to_dict(), tensors=dict(model.state_dict()))
    plan = GrowthPlan.stack(1, 3, "random")
    migration = migrate(state, plan, growth=GrowthConfig(), final_depth=FINAL_DEPTH, seed=3)
    family = family_of(model_type)
    for name in new_names(migration):
        _, suffix = family.split(name) or (0, "")
        tensor = migration.state.tensors[name]
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor) if suffix.endswith("weight") else tensor * 0)
        else:
            is_output = any(suffix.startswith(f"{module}.") for module in family.output_projections)
            expected = 0.03 / math.sqrt(2 * FINAL_DEPTH) if is_output else 0.03
            assert float(tensor.std()) == pytest.approx(expected, rel=0.06), name


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_geometric_extrapolates_the_source_layers_own_history(trained, model_type: str) -> None:
    state, migration = grown(trained, model_type, "stack", "geometric", to_layers=6)
    _, trajectory = trained(model_type, DEPTH)
    family, extrapolator = family_of(model_type), GrowthConfig().extrapolator()
    for name in new_names(migration):
        layer, suffix = family.split(name) or (0, "")
        source = family.name(layer - DEPTH, suffix)
        expected, metrics = extrapolator.extrapolate(trajectory.snapshots(source))
        torch.testing.assert_close(migration.state.tensors[name], expected, rtol=1e-6, atol=1e-9)
        assert not torch.equal(migration.state.tensors[name], state.tensors[source])
        assert migration.tensor_metrics[name]["tau"] == pytest.approx(metrics["tau"])
        assert migration.tensor_metrics[name]["init"] == "geometric"
        assert "fallback" not in migration.tensor_metrics[name]


def test_geometric_continues_from_the_weights_as_they_are_now(trained) -> None:
    state, trajectory = trained("llama", DEPTH)
    name = "model.layers.2.mlp.up_proj.weight"
    moved = dataclasses.replace(state, tensors={**state.tensors, name: state.tensors[name] + 1.0})
    plan, growth = GrowthPlan.top(DEPTH, 4, "geometric"), GrowthConfig()
    results = [
        migrate(s, plan, growth=growth, trajectory=trajectory, final_depth=4, seed=0).state.tensors
        for s in (state, moved)
    ]
    new = "model.layers.3.mlp.up_proj.weight"
    torch.testing.assert_close(
        results[1][new] - results[0][new], torch.ones_like(results[0][new]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("snapshots", [None, 0, 2])
def test_geometric_without_a_history_copies_and_says_so(trained, snapshots: int | None) -> None:
    state, trajectory = trained("gpt2", DEPTH)
    short = None if snapshots is None else type(trajectory)(8)
    for step in range(snapshots or 0):
        assert short is not None
        short.append({n: t for n, t in state.tensors.items() if family_of("gpt2").split(n)}, step)
    plan = GrowthPlan.front(DEPTH, 4, "geometric")
    migration = migrate(state, plan, growth=GrowthConfig(), trajectory=short, final_depth=4, seed=0)
    for name in new_names(migration):
        assert torch.equal(
            migration.state.tensors[name], migration.state.tensors[name.replace(".h.0.", ".h.1.")]
        )
        assert migration.tensor_metrics[name]["fallback"].startswith(f"copy: {snapshots or 0} snapshots")


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("moments", ["zero", "copy", "reset"])
def test_moments_of_new_tensors(trained, model_type: str, moments: str) -> None:
    state, migration = grown(trained, model_type, "interleave", "copy", to_layers=6, moments=moments)
    if moments == "reset":
        assert migration.state.moments == {}
        return
    family = family_of(model_type)
    assert new_names(migration) <= set(migration.state.moments)
    for name in new_names(migration):
        layer, suffix = family.split(name) or (0, "")
        source = state.moments[family.name(migration.plan.layers[layer].source, suffix)]
        for key, value in migration.state.moments[name].items():
            old = source[key]
            assert isinstance(value, Tensor)
            assert isinstance(old, Tensor)
            assert torch.equal(value, old if moments == "copy" else torch.zeros_like(old))


def test_moments_of_any_optimizer_are_carried(trained) -> None:
    state, _ = trained("gpt2", DEPTH)
    muon = {name: {"momentum_buffer": torch.ones(2), "step": 7} for name in state.moments}
    partly = {name: entry for name, entry in muon.items() if "ln_1" not in name}  # those were frozen
    plan = GrowthPlan.top(DEPTH, 4)
    result = migrate(
        dataclasses.replace(state, moments=partly), plan, growth=GrowthConfig(), final_depth=4, seed=0
    ).state.moments
    new = result["transformer.h.3.mlp.c_fc.weight"]
    assert isinstance(new["momentum_buffer"], Tensor)
    assert not new["momentum_buffer"].any()
    assert new["step"] == 0
    assert not any("ln_1" in name for name in result)


def test_moments_that_may_not_start_at_zero_are_left_to_the_optimizer(trained) -> None:
    state, _ = trained("gpt2", DEPTH)
    averaged = {name: {"exp_avg": torch.ones(2), "slow_weights": torch.ones(2)} for name in state.moments}
    result = migrate(
        dataclasses.replace(state, moments=averaged),
        GrowthPlan.top(DEPTH, 4),
        growth=GrowthConfig(),
        final_depth=4,
        seed=0,
    ).state.moments
    assert "transformer.h.2.mlp.c_fc.weight" in result
    assert not any(name.startswith("transformer.h.3.") for name in result)


@pytest.mark.parametrize("init", sorted(INITIALISERS))
def test_the_input_is_not_modified_and_new_tensors_share_no_storage(trained, init: Initialiser) -> None:
    state, _ = trained("gpt2", DEPTH)
    before = copy.deepcopy(state)
    _, migration = grown(trained, "gpt2", "stack", init, to_layers=9, moments="copy")
    assert before.config == state.config
    assert list(before.tensors) == list(state.tensors)
    assert all(torch.equal(before.tensors[name], state.tensors[name]) for name in state.tensors)
    assert all(same_moments(before.moments[name], state.moments[name]) for name in state.moments)
    tensors = migration.state.tensors
    storages = [tensors[name].untyped_storage().data_ptr() for name in tensors if name != "lm_head.weight"]
    assert len(set(storages)) == len(storages)
    moments = [
        m.data_ptr()
        for entry in migration.state.moments.values()
        for m in entry.values()
        if isinstance(m, Tensor)
    ]
    assert len(set(moments)) == len(moments)


def test_tied_tensors_stay_tied(trained) -> None:
    state, migration = grown(trained, "gpt2", "stack", "copy")
    head, embedding = (migration.state.tensors[n] for n in ("lm_head.weight", "transformer.wte.weight"))
    assert state.tensors["lm_head.weight"].data_ptr() == embedding.data_ptr() == head.data_ptr()
    assert "lm_head.weight" not in migration.state.moments


@pytest.mark.parametrize("init", ["random", "noise"])
def test_what_is_drawn_depends_on_seed_step_and_layer_alone(trained, init: Initialiser) -> None:
    state, trajectory = trained("llama", DEPTH)

    def draw(seed: int = 0, step: int = 6, to_layers: int = 5, reverse: bool = False) -> Mapping[str, Tensor]:
        tensors = dict(reversed(state.tensors.items())) if reverse else state.tensors
        torch.manual_seed(seed + step + to_layers)  # the global generator must not matter
        given = dataclasses.replace(state, tensors=tensors, step=step)
        plan = GrowthPlan.stack(DEPTH, to_layers, init)
        return migrate(
            given, plan, growth=GrowthConfig(), trajectory=trajectory, final_depth=9, seed=seed
        ).state.tensors

    name, other = "model.layers.3.mlp.up_proj.weight", "model.layers.6.mlp.up_proj.weight"
    reference = draw()[name]
    for same in (draw(), draw(to_layers=7), draw(reverse=True)):
        assert torch.equal(same[name], reference)
    for different in (draw(seed=1)[name], draw(step=7)[name], draw(to_layers=7)[other]):
        assert not torch.equal(different, reference)


@pytest.mark.parametrize("init", sorted(INITIALISERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(trained, init: Initialiser, dtype: torch.dtype) -> None:
    state, trajectory = trained("llama", 2, dtype)
    plan = GrowthPlan.stack(2, 4, init)
    migration = migrate(state, plan, growth=GrowthConfig(), trajectory=trajectory, final_depth=4, seed=0)
    assert {t.dtype for t in migration.state.tensors.values()} == {dtype}
    assert all(torch.isfinite(t).all() for t in migration.state.tensors.values())
    new = "model.layers.2.mlp.up_proj.weight"
    assert migration.state.moments[new]["exp_avg"].dtype == dtype  # pyright: ignore[reportAttributeAccessIssue]


def test_integer_tensors_of_a_block_are_copied(trained) -> None:
    state, trajectory = trained("gpt2", DEPTH)
    extra = {f"transformer.h.{layer}.attn.counter": torch.tensor([layer, 5]) for layer in range(DEPTH)}
    counted = dataclasses.replace(state, tensors={**state.tensors, **extra})
    for init in INITIALISERS:
        plan = GrowthPlan.top(DEPTH, 4, init)
        migration = migrate(
            counted, plan, growth=GrowthConfig(), trajectory=trajectory, final_depth=4, seed=0
        )
        assert migration.state.tensors["transformer.h.3.attn.counter"].tolist() == [2, 5]


def test_metrics_are_json(trained) -> None:
    for init in INITIALISERS:
        _, migration = grown(trained, "gpt2", "stack", init)
        assert json.loads(json.dumps(migration.tensor_metrics)) == migration.tensor_metrics


def test_per_layer_lists_of_the_configuration_move_with_the_layers(make_model, to_model) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = make_model("qwen3", 3, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    state = TrainingState(config=model.config.to_dict(), tensors=dict(model.state_dict()))
    migration = migrate(
        state, GrowthPlan.interleave(3, 6, "zero"), growth=GrowthConfig(), final_depth=6, seed=0
    )
    assert migration.state.config["layer_types"] == [kind for kind in kinds for _ in range(2)]
    assert state.config["layer_types"] == kinds
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        before, after = (to_model(s)(tokens, use_cache=False).logits for s in (state, migration.state))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    bad = dataclasses.replace(state, config={**state.config, "layer_types": kinds[:2]})
    with pytest.raises(ValueError, match="must be equal to the number of `layer_types`"):
        migrate(bad, GrowthPlan.stack(3, 6), growth=GrowthConfig(), final_depth=6, seed=0)


def test_attention_scaled_by_the_layers_index_allows_no_moving(trained) -> None:
    state, _ = trained("gpt2", DEPTH)
    scaled = dataclasses.replace(state, config={**state.config, "scale_attn_by_inverse_layer_idx": True})
    migrate(scaled, GrowthPlan.stack(DEPTH, 6, "zero"), growth=GrowthConfig(), final_depth=6, seed=0)
    with pytest.raises(ValueError, match="'stack' or 'top'"):
        migrate(scaled, GrowthPlan.front(DEPTH, 6, "zero"), growth=GrowthConfig(), final_depth=6, seed=0)


def test_disagreements_are_refused(trained) -> None:
    state, _ = trained("gpt2", DEPTH)
    settings: dict[str, Any] = {"growth": GrowthConfig(), "final_depth": 6, "seed": 0}
    with pytest.raises(ValueError, match="plan is for 4 layers, the model has 3"):
        migrate(state, GrowthPlan.stack(4, 6), **settings)
    stale = dataclasses.replace(state, config={**state.config, "n_layer": 4})
    with pytest.raises(ValueError, match="states 4 layers"):
        migrate(stale, GrowthPlan.stack(4, 6), **settings)
    with pytest.raises(ValueError, match="2 lists of blocks"):
        migrate(dataclasses.replace(state, config={"model_type": "t5"}), GrowthPlan.stack(3, 6), **settings)
    with pytest.raises(ValueError, match="of a llama model lacks 'num_hidden_layers'"):
        migrate(dataclasses.replace(state, family=family_of("llama")), GrowthPlan.stack(3, 6), **settings)


def test_renames_name_the_old_tensor_first() -> None:
    family, plan = family_of("gpt2"), GrowthPlan.front(2, 4)
    names = ["transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"]
    assert renames(names, plan, family) == {
        "transformer.wte.weight": ("transformer.wte.weight",),
        "transformer.h.0.ln_1.weight": tuple(f"transformer.h.{i}.ln_1.weight" for i in (2, 0, 1)),
        "transformer.h.1.ln_1.weight": ("transformer.h.3.ln_1.weight",),
    }
