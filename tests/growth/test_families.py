from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE
from tests.growth.modules import Classifier, PreNorm
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from aiether.growth import FAMILIES, Family, block_tensors, depth_of, family_of

BERT = BertConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
)


def test_a_family_maps_names_to_layers_and_back() -> None:
    family = family_of("llama")
    assert family.split("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert family.name(12, "mlp.up_proj.weight") == "model.layers.12.mlp.up_proj.weight"
    for name in ("model.embed_tokens.weight", "model.layers.x.weight", "xmodel.layers.0.a", "model.layers.0"):
        assert family.split(name) is None


def test_layers_are_grouped_in_numerical_order() -> None:
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (10, 2, 0)]
    assert list(block_tensors(names, family_of("llama"))) == [0, 2, 10]


@pytest.mark.parametrize("source", [{}, object(), "gpt9", {"model_type": "gpt9"}])
def test_an_unknown_type_is_refused_with_how_to_name_the_blocks(source: object) -> None:
    with pytest.raises(ValueError, match=r'family_of\(model, blocks="encoder.layers"\).*FAMILIES'):
        family_of(source)


def test_two_lists_of_blocks_are_refused_until_one_is_named() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2)
    )
    with pytest.raises(ValueError, match=r'2 lists of blocks.*blocks="encoder.block"'):
        family_of(model)
    family = family_of(model, blocks="decoder.block", depth_key="num_decoder_layers")
    assert family.depth(model.config.to_dict()) == depth_of(model, family) == 3


def test_a_wrong_path_is_refused_with_the_paths_that_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"no list of blocks at 'encoder.layer' \(there are: encoder.layers\)"
    ):
        family_of(Classifier(2), blocks="encoder.layer")
    with pytest.raises(ValueError, match="Linear has no list of equal blocks"):
        family_of(nn.Linear(2, 2))


def test_a_module_without_a_configuration_is_understood() -> None:
    family = family_of(Classifier(3))
    assert family == family_of(Classifier(5), blocks="encoder.layers")
    assert (family.blocks, family.depth_key, family.per_layer_keys) == ("encoder.layers", None, ())
    assert family.output_projections == ("mix", "out")
    assert dict(family.identity) == {"mix.weight": 0.0, "out.bias": 0.0, "out.weight": 0.0}
    assert depth_of(Classifier(3)) == depth_of(Classifier(3), family) == 3


def test_a_module_with_a_plain_configuration_names_its_depth() -> None:
    class Settings:
        def __init__(self) -> None:
            self.n_layer, self.n_head = 3, 2

    model: Any = Classifier(3)
    model.config = Settings()
    assert family_of(model).depth_key == "n_layer"


def test_a_vision_transformer_is_found_and_silenced() -> None:
    model = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        )
    )
    family = family_of(model)
    assert depth_of(model) == len(block_tensors(model.state_dict(), family)) == 3
    assert len(family.output_projections) == 2
    assert family.refusal is None


def test_a_post_norm_block_is_found_and_says_what_stands_in_the_way() -> None:
    family = family_of(BertModel(BERT))
    assert family.blocks == "encoder.layer"
    assert family.refusal == "native_layer_norm stands on the residual stream"
    assert family.identity == ()


def test_named_projections_win_over_what_was_found() -> None:
    family = family_of(BertModel(BERT), output_projections=("output.dense",))
    assert family.refusal is None
    assert family.identity_value("output.dense.bias") == 0.0
    assert family.identity_value("attention.output.dense.weight") is None


def test_names_of_a_folder_may_lie_under_another_prefix_and_name_experts_one_by_one() -> None:
    names = [f"layers.{layer}.mlp.experts.{e}.w.weight" for layer in range(2) for e in range(3)]
    assert family_of({"model_type": "olmoe", "num_hidden_layers": 2}, names=names).blocks == "layers"
    olmoe, mixtral = family_of("olmoe"), family_of("mixtral")
    assert olmoe.identity_value("mlp.experts.2.down_proj.weight") == 0.0
    assert olmoe.identity_value("mlp.experts.2.up_proj.weight") is None
    assert mixtral.identity_value("block_sparse_moe.experts.7.w2.weight") == 0.0
    assert mixtral.identity_value("block_sparse_moe.experts.7.w1.weight") is None


def test_one_registry_entry_makes_a_family_known(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Family(
        model_type="own", blocks="decoder.blocks", output_projections=("mix.out",), depth_key="depth"
    )
    monkeypatch.setitem(FAMILIES, "own", own)
    assert family_of({"model_type": "own"}).split("decoder.blocks.7.mix.out.weight") == (7, "mix.out.weight")
    assert own.depth({"depth": 4}) == 4
    with pytest.raises(ValueError, match="lacks 'depth'"):
        own.depth({"n_layer": 4})
    assert dataclasses.replace(own, blocks="h").name(0, "a.weight") == "h.0.a.weight"


def test_asking_changes_nothing_and_draws_nothing() -> None:
    model, calls = Classifier(2), []
    assert isinstance(model.encoder.layers, nn.ModuleList)
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = torch.get_rng_state()
    family_of(model)
    family_of({"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 2})
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not calls
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_models_own_configuration_stays_as_it_is() -> None:
    model = FAMILY_TABLE[0].build(2)
    before = model.config.to_dict(), model.config._attn_implementation, model.config.use_cache
    family_of(model)
    assert (model.config.to_dict(), model.config._attn_implementation, model.config.use_cache) == before


def test_a_name_from_a_file_builds_models_only() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "architectures": ["pipeline", "LlamaModel"]}
    assert family_of(config).blocks == "layers"


def test_a_list_of_layer_numbers_is_no_list_with_one_entry_a_layer() -> None:
    config = {"model_type": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [0, 1]}
    assert family_of(config).per_layer_keys == ("layer_types",)


def test_a_depth_that_no_setting_states_is_refused_when_it_is_asked_for() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="lacks 'depth'"):
        family_of(config, blocks="model.layers", depth_key="depth").depth(config)


def test_a_block_that_needs_more_than_hidden_states_cannot_be_read_and_says_so() -> None:
    class Needy(PreNorm):
        def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(hidden) + mask

    model = nn.Module()
    model.layers = nn.ModuleList([Needy(), Needy()])
    family = family_of(model)
    assert family.refusal is not None
    assert "missing 1 required positional argument: 'mask'" in family.refusal


def test_a_mixtral_with_an_adapter_is_asked_for_its_structure() -> None:
    """The names of its folder are known beside, not instead of, what the model as it is carries out."""
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    plain = family_of(model)
    for name, block in [(n, m) for n, m in model.named_modules() if n.endswith("self_attn")]:
        base = block.get_submodule("o_proj")
        assert isinstance(base, nn.Linear), name
        block.add_module("o_proj", Adapted(base))
    adapted = family_of(model)
    assert plain.identity_value("self_attn.o_proj.weight") == 0.0
    assert adapted.identity_value("self_attn.o_proj.base.weight") == 0.0
    assert adapted.identity_value("self_attn.o_proj.up.weight") == 0.0
    assert adapted.identity_value("block_sparse_moe.experts.1.w2.weight") == 0.0


class Adapted(nn.Module):
    """A projection with a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
