"""Migration beyond transformers' plain decoders: any module, shared tensors, lists that a rule stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE
from tests.growth.modules import WIDTH, Classifier
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from aiether.geometry import Trajectory
from aiether.growth import (
    INITIALISERS,
    Family,
    GrowthConfig,
    GrowthPlan,
    Migration,
    TrainingState,
    family_of,
    grow_config,
    migrate,
)
from aiether.growth.config import Initialiser
from aiether.integrations._model import build_model

CASES = {case.name: case for case in FAMILY_TABLE}


def carried_out(
    model: nn.Module, plan: GrowthPlan, family: Family | None = None, **settings: Any
) -> Migration:
    config = getattr(model, "config", None)
    state = TrainingState(
        config=config.to_dict() if config else {}, tensors=dict(model.state_dict()), family=family
    )
    return migrate(state, plan, **{"growth": GrowthConfig(), "final_depth": 6, "seed": 0, **settings})


@pytest.mark.parametrize("init", INITIALISERS)
@pytest.mark.parametrize("named", [True, False])
def test_any_module_with_a_list_of_blocks_grows(init: Initialiser, named: bool) -> None:
    model = Classifier(2)
    family = Family(blocks="encoder.layers", output_projections=("mix", "out")) if named else family_of(model)
    plan = GrowthPlan.explicit(model, ["+0", 0, 1, "+1"], init, family=family)
    grown = Classifier(4)
    grown.load_state_dict(carried_out(model, plan, family).state.tensors, strict=True)
    hidden = torch.randn(2, 5, WIDTH)
    gap = float((grown(hidden) - model(hidden)).abs().max().detach())
    assert gap < 1e-6 if init == "zero" else gap > 1e-4


def test_a_vision_transformer_grows_and_keeps_its_function() -> None:
    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        )
    ).eval()
    migration = carried_out(model, GrowthPlan.interleave(model, 4, "zero"), family_of(model))
    grown, pixels = build_model(model, migration.state), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before, after = (m(pixels).last_hidden_state for m in (model, grown))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert grown.config.num_hidden_layers == 4


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_keeps_its_function_where_its_norms_come_first(norm_first: bool) -> None:
    def build(depth: int) -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()

    model, grown = build(2), build(3)
    if not norm_first:
        with pytest.raises(
            ValueError, match=r"cannot keep the function .* on the residual stream. Choose copy"
        ):
            carried_out(model, GrowthPlan.top(model, 3, "zero"), family_of(model))
        return
    grown.load_state_dict(
        carried_out(model, GrowthPlan.top(model, 3, "zero"), family_of(model)).state.tensors
    )
    hidden = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(grown(hidden), model(hidden))


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_zero_is_refused_for_norms_on_the_residual_stream_and_copy_is_not(kind: str) -> None:
    if kind == "opt":
        model: Any = CASES["opt"].build(2, do_layer_norm_before=False)
    else:
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model = BertModel(BertConfig(vocab_size=32, hidden_size=16, **sizes))
    family = family_of(model)
    with pytest.raises(ValueError, match="native_layer_norm stands on the residual stream"):
        carried_out(model, GrowthPlan.stack(model, 4, "zero"), family)
    grown = build_model(model, carried_out(model, GrowthPlan.stack(model, 4, "copy"), family).state)
    assert grown.config.num_hidden_layers == 4


class Looped(Classifier):
    """Its layers share one matrix, which is also the head's."""

    def __init__(self, depth: int, *, shared: str = "up") -> None:
        super().__init__(depth)
        self.head = nn.Linear(WIDTH, 2 * WIDTH if shared == "up" else WIDTH, bias=False)
        for layer in self.encoder.layers:
            setattr(layer.get_submodule(shared), "weight", self.head.weight)  # noqa: B010 - no such attribute


@pytest.mark.parametrize("init", ["noise", "random", "copy"])
def test_tensors_that_layers_share_stay_shared(init: Initialiser) -> None:
    model = Looped(2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 2, WIDTH)).sum().backward()
    optimizer.step()
    moments = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    shared = "encoder.layers.0.up.weight"
    assert shared in moments
    assert "head.weight" not in moments
    state = TrainingState(
        config={}, tensors=dict(model.state_dict()), moments=moments, family=family_of(model)
    )
    plan = GrowthPlan.front(model, 4, init)
    grown = migrate(state, plan, growth=GrowthConfig(), final_depth=4, seed=0).state
    pointers = {grown.tensors[f"encoder.layers.{layer}.up.weight"].data_ptr() for layer in range(4)}
    assert pointers == {model.head.weight.data_ptr()} == {grown.tensors["head.weight"].data_ptr()}
    larger = Looped(4)
    larger.load_state_dict(grown.tensors, strict=True)
    assert torch.equal(larger.head.weight, model.head.weight)
    assert grown.moments.keys() == dict(larger.named_parameters()).keys()
    assert torch.equal(
        torch.as_tensor(grown.moments[shared]["exp_avg"]), torch.as_tensor(moments[shared]["exp_avg"])
    )


def test_zero_does_not_fill_what_layers_share() -> None:
    model = Looped(2, shared="mix")
    with pytest.raises(ValueError, match=r"would have to fill 'mix.weight', which layers share"):
        carried_out(model, GrowthPlan.top(model, 3, "zero"), family_of(model))


def test_tensors_tied_within_a_block_stay_tied() -> None:
    model = Classifier(1)
    tensors = dict(model.state_dict())
    tensors["encoder.layers.0.twin"] = tensors["encoder.layers.0.mix.weight"]
    state = TrainingState(config={}, tensors=tensors, family=family_of(model))
    plan = GrowthPlan.top(1, 2, "noise")
    grown = migrate(state, plan, growth=GrowthConfig(), final_depth=2, seed=0).state.tensors
    assert grown["encoder.layers.1.twin"] is grown["encoder.layers.1.mix.weight"]
    assert not torch.equal(grown["encoder.layers.1.twin"], grown["encoder.layers.0.twin"])


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
            "layer_types",
            ["full", "full", "full", "full", "sliding", "sliding"],
        ),
        (
            {"model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2},
            "layer_types",
            ["sliding", "sliding", "full", "full", "sliding", "sliding"],
        ),
        (
            {"model_type": "gemma2"},
            "layer_types",
            ["sliding", "sliding", "full", "full", "sliding", "sliding"],
        ),
        ({"model_type": "smollm3", "no_rope_layer_interval": 3}, "no_rope_layers", [1, 1, 1, 1, 0, 0]),
    ],
)
def test_lists_that_a_rule_stands_for_are_written_out_before_layers_move(
    config: dict[str, Any], key: str, expected: list[Any]
) -> None:
    config = {**config, "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
    grown = grow_config(config, GrowthPlan.interleave(3, 6), family_of(config))
    kinds = [v.removesuffix("_attention") if isinstance(v, str) else v for v in grown[key]]
    assert kinds == expected
    assert key not in config


def test_layers_with_settings_of_their_own_are_refused() -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "per_layer_config": {1: {"intermediate_size": 8}},
    }
    with pytest.raises(ValueError, match="per_layer_config"):
        grow_config(config, GrowthPlan.top(2, 3), family_of("llama"))


def test_a_configuration_without_a_known_depth_is_refused() -> None:
    family = Family(blocks="layers", depth_key=None)
    with pytest.raises(ValueError, match=r"which setting .* is the number of layers"):
        grow_config({"num_blocks": 3}, GrowthPlan.top(3, 4), family)


def test_random_layers_of_gemma_have_neutral_norms() -> None:
    model = CASES["gemma3"].build(2)
    grown = carried_out(model, GrowthPlan.top(model, 3, "random")).state.tensors
    norms = [tensor for name, tensor in grown.items() if ".2." in name and "norm" in name]
    assert len(norms) == 6
    assert not any(tensor.any() for tensor in norms)  # used as 1 + w


def test_each_new_layer_follows_its_own_coefficients() -> None:
    model, trajectory = Classifier(1), Trajectory(6)
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        trajectory.append({n: p for n, p in model.named_parameters() if "layers" in n}, step)

    def grown(plan: GrowthPlan, growth: GrowthConfig) -> list[Tensor]:
        result = carried_out(model, plan, family_of(model), growth=growth, trajectory=trajectory)
        return [result.state.tensors[f"encoder.layers.{layer}.mix.weight"] for layer in (1, 2)]

    plan = GrowthPlan.top(1, 3, "geometric")
    own: dict[str, Any] = {"beta0": 0.5, "gamma0": 0.0, "eta0": 0.02}
    first, second = grown(plan.with_gains({2: own}), GrowthConfig())
    assert torch.equal(first, grown(plan, GrowthConfig())[0])
    assert torch.equal(second, grown(plan, GrowthConfig(**own))[1])
    assert not torch.equal(first, second)
