"""Tiny LAHR models whose parts all matter, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aiether.adaptive import LahrConfig, LahrForCausalLM, LahrSettings, lahr_parts

VOCAB = 37
CONDITIONS = (
    "full",
    "no_mod",
    "no_latent",
    "no_memory",
    "mod_only",
    "latent_only",
    "memory_only",
    "baseline",
)


def lahr_config(condition: str = "full", *, depth: int = 2, tied: bool = True, **settings: Any) -> LahrConfig:
    """A configuration of width 16; `settings` are those of `LahrSettings` without their prefix."""
    given = {
        "capacity": 0.25,
        "burst": 2,
        "iterations": 3,
        "memory_keys": 4,
        "memory_heads": 2,
        "memory_top_k": 2,
    }
    given |= {"condition": condition, **settings}
    parts = lahr_parts(LahrSettings(**{f"lahr_{name}": value for name, value in given.items()}), depth)
    return LahrConfig(
        num_hidden_layers=depth,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **parts,
    )


def lahr(condition: str = "full", *, seed: int = 0, **settings: Any) -> Any:
    """A model in evaluation mode with weights so large that routing, halting and memory decide something.

    `Any`: tests reach into parts that a model may not have.
    """
    torch.manual_seed(seed)
    model = LahrForCausalLM(lahr_config(condition, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5)
    return model.eval()


def tokens(rows: int = 3, length: int = 20, seed: int = 1) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(input_ids: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    """Rows that lost tokens on their left to padding, as many as is said, and their attention mask."""
    mask = torch.ones_like(input_ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return input_ids * mask, mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a backward pass left, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
