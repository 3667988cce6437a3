"""The table of model families: a tiny configuration of each, for tests that should hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import aiether.adaptive.model  # noqa: F401 - makes the model type lahr known

VOCAB = 32
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCAB}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
PLAIN = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """One row: a family, and what `zero` is known to fill (worked out by hand from the block's equations)."""

    name: str
    model_type: str
    zeroed: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    value: float = 0.0

    @property
    def projections(self) -> tuple[str, ...]:
        """The matrices that write into the residual stream."""
        if self.zeroed == _POST_NORMS:
            return _LLAMA_OUT
        return tuple(name for name in self.zeroed if not name.endswith("bias"))

    def build(self, depth: int = 2, seed: int = 0, **settings: Any) -> PreTrainedModel:
        """A tiny model without dropout in which no two layers hold an equal tensor."""
        config = AutoConfig.for_model(
            self.model_type, **{**TOKENS, **self.settings, "num_hidden_layers": depth, **settings}
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()


def _with_bias(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias"))


_LLAMA_OUT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_NEOX_OUT = _with_bias("attention.dense", "mlp.dense_4h_to_h")
_POST_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")

FAMILY_TABLE = (
    FamilyCase(
        "gpt2",
        "gpt2",
        _with_bias("attn.c_proj", "mlp.c_proj"),
        {"n_embd": 16, "n_head": 2, "n_positions": 64, **NO_DROPOUT},
    ),
    FamilyCase(
        "llama",
        "llama",
        _with_bias("self_attn.o_proj", "mlp.down_proj"),
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
    ),
    FamilyCase("mistral", "mistral", _LLAMA_OUT, {**LLAMA, "sliding_window": 4}),
    FamilyCase("qwen2", "qwen2", _LLAMA_OUT, {**LLAMA, **WINDOWS, "max_window_layers": 1}),
    FamilyCase("qwen3", "qwen3", _LLAMA_OUT, {**LLAMA, **WINDOWS, "max_window_layers": 1, "head_dim": 8}),
    FamilyCase("gemma2", "gemma2", _POST_NORMS, {**LLAMA, "sliding_window": 4, "head_dim": 8}, -1.0),
    FamilyCase(
        "gemma3",
        "gemma3_text",
        _POST_NORMS,
        {**LLAMA, "sliding_window": 4, "sliding_window_pattern": 2, "head_dim": 8},
        -1.0,
    ),
    FamilyCase(
        "phi",
        "phi",
        _with_bias("self_attn.dense", "mlp.fc2"),
        {**LLAMA, "num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    FamilyCase("phi3", "phi3", _LLAMA_OUT, {**LLAMA, "original_max_position_embeddings": 64}),
    FamilyCase("gpt_neox", "gpt_neox", _NEOX_OUT, PLAIN),
    FamilyCase("gpt_neox-serial", "gpt_neox", _NEOX_OUT, {**PLAIN, "use_parallel_residual": False}),
    FamilyCase(
        "opt",
        "opt",
        _with_bias("self_attn.out_proj", "fc2"),
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "dropout": 0.0,
        },
    ),
    FamilyCase(
        "mixtral",
        "mixtral",
        ("self_attn.o_proj.weight", "mlp.experts.down_proj"),
        {**LLAMA, "num_local_experts": 3, "head_dim": 8},
    ),
    FamilyCase("olmo2", "olmo2", _POST_NORMS, LLAMA),
    FamilyCase(
        "lahr",
        "lahr",
        _LLAMA_OUT,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "route_every": 2,
            "routing": {"capacity": 0.5, "router": "threshold"},
            "latent": {"iterations": 2},
            "memory": {"keys": 4, "heads": 1, "top_k": 2, "key_size": 4},
        },
    ),
    FamilyCase(
        "smollm3",
        "smollm3",
        _LLAMA_OUT,
        {**LLAMA, **WINDOWS, "no_rope_layer_interval": 2},
    ),
)

FAMILY_NAMES = tuple(case.name for case in FAMILY_TABLE)
"""Rows by name, for `pytest.mark.parametrize(..., ids=FAMILY_NAMES)`."""


def every_second_layer_a_mixture() -> PreTrainedModel:
    """Two layers, the upper one a mixture of experts: a layer more below turns them round."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        num_experts_per_tok=1,
        decoder_sparse_step=2,
    )
    return AutoModelForCausalLM.from_config(config)
