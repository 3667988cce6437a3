"""Attention masks in the form that each of transformers' attention implementations takes."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import Slots, gather


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


def among_slots(mask_B1QK: Tensor, slots: Slots) -> Tensor:
    """Which slot may attend to which, bool (B, 1, K, K), by a mask over the tokens; causal in any case.

    Padding, windows and packed documents are honoured. Every slot may attend to itself: no row is empty.
    """
    batch, num_slots = slots.index_BK.shape
    allowed_BTT = mask_B1QK[:, 0] if mask_B1QK.dtype == torch.bool else mask_B1QK[:, 0] == 0
    rows_BKT = gather(allowed_BTT.expand(batch, -1, -1), slots)
    columns_BKK = slots.index_BK[:, None, :].expand(-1, num_slots, -1)
    own_KK = torch.eye(num_slots, dtype=torch.bool, device=rows_BKT.device)
    return ((rows_BKT.gather(-1, columns_BKK) | own_KK) & torch.ones_like(own_KK).tril())[:, None]


def present_tokens(
    mask_B1QK: Tensor | None, num_tokens: int, seen: int | Tensor | None = None
) -> Tensor | None:
    """Which of the last `num_tokens` tokens are no padding, bool (B, T): a causal mask's diagonal says.

    Args:
        seen: how many tokens came before, int64 scalar, where the mask has columns for later ones too, as a
            static cache's has; None: the tokens are its last columns.
    """
    if mask_B1QK is None or mask_B1QK.ndim != 4:
        return None
    rows_BTK = mask_B1QK[:, 0, -num_tokens:]
    if seen is None:
        diagonal_BT = rows_BTK[..., -num_tokens:].diagonal(dim1=-2, dim2=-1)
    else:
        own_T = torch.arange(num_tokens, device=rows_BTK.device) + seen
        own_BT1 = own_T[:, None].expand(len(rows_BTK), -1, 1)
        diagonal_BT = rows_BTK.gather(-1, own_BT1)[..., 0]
    return diagonal_BT if diagonal_BT.dtype == torch.bool else diagonal_BT == 0
