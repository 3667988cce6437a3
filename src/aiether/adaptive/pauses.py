"""Pause tokens: room to compute that says nothing, the control of thinking in another way.

A model sees `count` fillers between what is asked and the answer (Goyal et al. 2023, arXiv:2310.02226). They
cost tokens instead of iterations, and none of their own outputs is scored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Paused(NamedTuple):
    """Rows with pauses in them.

    Attributes
    ----------
    input_ids: int64 (B, T + count).
    labels: the same shape, for a model that shifts them itself; -100 at pauses.
    attention_mask: the same shape, 1 at pauses.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


def insert_pauses(
    input_ids: Tensor,
    positions: Tensor | int,
    count: int,
    pause_id: int,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Paused:
    """Put `count` pauses before the token at `positions` of each row; all else keeps its order.

    The last pause predicts the token behind it, which keeps its label: what is asked for after a pause.

    Args:
        input_ids: int64 (B, T).
        positions: int64 (B,) or one number for all rows, from 0 to T; T: behind the row's end.
        labels: (B, T), default the inputs, without what `attention_mask` leaves out.
        attention_mask: (B, T), default all 1.

    Raises
    ------
    ValueError
        If `count` is negative, or a position lies outside of the row.
    """
    num_rows, num_tokens = input_ids.shape
    if count < 0:
        raise ValueError(f"count is {count}: give 0 pauses or more")
    at_B1 = torch.as_tensor(positions, device=input_ids.device).expand(num_rows)[:, None]
    given = [positions] if isinstance(positions, int) else at_B1.flatten().tolist()
    if not all(0 <= each <= num_tokens for each in given):
        raise ValueError(
            f"pauses are to stand at {sorted(set(given))}, and rows have {num_tokens} tokens: give positions "
            f"from 0 to {num_tokens}"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if labels is None:
        labels = input_ids.masked_fill(~attention_mask.bool(), IGNORED)
    place_1T = torch.arange(num_tokens + count, device=input_ids.device)[None]
    paused = (place_1T >= at_B1) & (place_1T < at_B1 + count)
    source = torch.where(place_1T < at_B1, place_1T, place_1T - count).clamp(0, max(num_tokens - 1, 0))

    def spread(tensor: Tensor, filler: int) -> Tensor:
        return tensor.gather(1, source).masked_fill(paused, filler)

    return Paused(spread(input_ids, pause_id), spread(labels, IGNORED), spread(attention_mask, 1))
