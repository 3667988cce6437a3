from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.families import FAMILY_NAMES, FAMILY_TABLE, LLAMA, TOKENS, FamilyCase
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from aiether.growth import GrowthPlan, check_blocks_match, family_of, index_attributes
from aiether.integrations._model import blocks_of, check_plan_fits


@pytest.mark.parametrize("case", FAMILY_TABLE, ids=FAMILY_NAMES)
@pytest.mark.parametrize("depth", [1, 3])
def test_every_place_that_holds_the_index_is_found(case: FamilyCase, depth: int) -> None:
    blocks = blocks_of(model := case.build(depth), family_of(model))
    places = index_attributes(blocks)
    assert places
    modules = [dict(block.named_modules()) for block in blocks]
    held = {path for own in modules for path, module in own.items() if hasattr(module, "layer_idx")}
    assert {path for path, name in places if name == "layer_idx"} == held
    for layer, own in enumerate(modules):
        assert all(getattr(own[path], name) == layer for path, name in places if path in own)


def test_an_index_may_have_any_name_and_start_at_one() -> None:
    blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    for layer, block in enumerate(blocks):
        vars(block).update(number=layer + 1, width=7)
    assert index_attributes(blocks) == (("", "number"),)


def mixture(depth: int, **settings: Any) -> Qwen2MoeForCausalLM:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config: dict[str, Any] = {**LLAMA, **TOKENS, **experts, **settings, "num_hidden_layers": depth}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**config, shared_expert_intermediate_size=8))


def test_a_plan_that_would_turn_a_dense_layer_into_experts_is_refused() -> None:
    model = mixture(3, mlp_only_layers=[0])
    family = family_of(model)
    assert {name for name, _ in family.identity} >= {"mlp.down_proj.weight", "mlp.experts.down_proj"}
    with pytest.raises(ValueError, match=r"layer 1 of the grown qwen2_moe would not be what layer 0 was"):
        check_plan_fits(model, GrowthPlan.front(model, 4), family)
    check_plan_fits(model, GrowthPlan.top(model, 5), family)


def test_a_scale_that_follows_the_index_is_seen() -> None:
    def build(depth: int) -> nn.Module:
        config = AutoConfig.for_model(
            "gpt2", n_embd=16, n_head=2, n_layer=depth, vocab_size=32, scale_attn_by_inverse_layer_idx=True
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    small, large = build(2), build(3)
    family = family_of("gpt2")
    with pytest.raises(ValueError, match=r"attn.scaling was .* and is"):
        check_blocks_match(small, large, GrowthPlan.top(2, 3), family)


def test_models_of_other_depths_than_the_plan_are_refused() -> None:
    model = FAMILY_TABLE[0].build(2)
    with pytest.raises(ValueError, match="have 2 and 2 layers, the plan goes from 2 to 3"):
        check_blocks_match(model, copy.deepcopy(model), GrowthPlan.top(2, 3), family_of(model))
