from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE, FamilyCase
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from aiether.evaluation import count_forward_flops, flops_per_token, measure_flops_per_token

TOKENS: dict[str, Any] = {"vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(**settings: Any) -> GPT2Config:
    return GPT2Config(**{"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 64, **TOKENS, **settings})


def llama(**settings: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "intermediate_size": 80,
    }
    return LlamaConfig(**{**sizes, "max_position_embeddings": 64, **TOKENS, **settings})


def model_of(config: GPT2Config | LlamaConfig) -> PreTrainedModel:
    return GPT2LMHeadModel(config) if isinstance(config, GPT2Config) else LlamaForCausalLM(config)


CONFIGS = {
    "gpt2 tied": gpt2(tie_word_embeddings=True),
    "gpt2 untied": gpt2(tie_word_embeddings=False),
    "gpt2 narrow mlp": gpt2(n_inner=50, n_layer=1),
    "llama tied": llama(tie_word_embeddings=True),
    "llama untied": llama(tie_word_embeddings=False),
    "llama grouped queries": llama(num_key_value_heads=2),
    "llama one key head, wide heads": llama(num_key_value_heads=1, head_dim=16),
}


@pytest.mark.parametrize("context_length", [16, 64])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_closed_form_is_what_the_counter_counts(
    config: GPT2Config | LlamaConfig, context_length: int
) -> None:
    # With eager attention both count the same matrix products, with one exception: some versions of
    # transformers make Llama's rotary angles by an outer product, head_dim FLOPs a token, once and without
    # a backward pass.
    extra = measure_flops_per_token(model_of(config), context_length) - flops_per_token(
        config, context_length
    )
    assert extra in ({0} if isinstance(config, GPT2Config) else {0, config.head_dim})


def test_a_real_training_step_on_the_model_itself_counts_the_same() -> None:
    model = model_of(gpt2(attn_implementation="eager", use_cache=False))
    ids = torch.randint(0, 101, (3, 32), generator=torch.Generator().manual_seed(0))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == ids.numel() * flops_per_token(model.config, 32)


def test_head_and_attention_are_in_it() -> None:
    base = flops_per_token(gpt2(), 16)
    assert flops_per_token(gpt2(vocab_size=201), 16) - base == 3 * 2 * 48 * 100
    assert flops_per_token(gpt2(), 48) - base == 3 * 3 * 4 * 48 * 32


def test_every_layer_costs_the_same() -> None:
    two, three, four = (flops_per_token(gpt2(n_layer=depth), 16) for depth in (2, 3, 4))
    assert four - three == three - two


def test_measuring_leaves_the_model_alone() -> None:
    model = model_of(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    measure_flops_per_token(model, 16)
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_families_are_measured() -> None:
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        pad_token_id=1,
        **TOKENS,
    )
    with pytest.raises(ValueError, match=r"model_type 'opt'; known are gpt2, lahr, llama, phi; measure"):
        flops_per_token(config, 16)
    # OPT's blocks and head have GPT-2's shapes, with an MLP of ffn_dim.
    same_shapes = gpt2(n_embd=32, n_inner=64, n_layer=2)
    assert measure_flops_per_token(OPTForCausalLM(config), 16) == flops_per_token(same_shapes, 16)


COUNTED = [case for case in FAMILY_TABLE if case.name in ("gpt2", "llama", "phi", "qwen3", "mixtral")]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_a_forward_pass_counts_the_same_whichever_kernels_run_it(case: FamilyCase) -> None:
    ids = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(0))
    eager, fused = case.build(attn_implementation="eager"), case.build(attn_implementation="sdpa")
    if case.name == "mixtral":
        eager.set_experts_implementation("eager")
        fused.set_experts_implementation("grouped_mm")
    counted = count_forward_flops(fused, ids)
    assert counted == count_forward_flops(eager, ids)
    if case.name in ("gpt2", "llama", "phi"):
        assert 3 * counted == ids.numel() * flops_per_token(fused.config, 24)
