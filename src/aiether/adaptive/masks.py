"""Attention masks in the form that each of transformers' attention implementations takes."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    allowed_B1QK: Tensor | None, num_queries: int, implementation: str | None, like: Tensor
) -> Tensor | None:
    """What to pass as `attention_mask` so that a query sees the allowed columns; None means causal.

    `sdpa` takes a boolean mask, or none at all for plain causal attention; `eager` adds its mask, and without
    one it would see the future.

    Raises
    ------
    ValueError
        For another implementation.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation is {implementation!r}: layers that skip tokens work with 'sdpa' and "
            "'eager'; load the model with one of them"
        )
    if allowed_B1QK is None:
        if implementation == "sdpa" and num_queries > 1:
            return None
        ones = torch.ones(num_queries, num_queries, dtype=torch.bool, device=like.device)
        allowed_B1QK = ones.tril()[None, None]
    if implementation == "sdpa":
        return allowed_B1QK
    blocked = torch.zeros(allowed_B1QK.shape, dtype=like.dtype, device=like.device)
    return blocked.masked_fill(~allowed_B1QK, torch.finfo(like.dtype).min)


def present_tokens(mask_B1QK: Tensor | None, num_tokens: int) -> Tensor | None:
    """Which of the last `num_tokens` columns are no padding, bool (B, T): a causal mask's diagonal says."""
    if mask_B1QK is None or mask_B1QK.ndim != 4:
        return None
    diagonal_BT = mask_B1QK[:, 0, -num_tokens:, -num_tokens:].diagonal(dim1=-2, dim2=-1)
    return diagonal_BT if diagonal_BT.dtype == torch.bool else diagonal_BT == 0
