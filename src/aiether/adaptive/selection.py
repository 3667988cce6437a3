"""Which tokens of a sequence a layer processes, as slots of a static number, in the order of the sequence.

Notation: B rows, T tokens, K slots. Slots that hold no token come last, so that causal attention among the
slots never lets a token see one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Positions = TypeVar("Positions", Tensor, np.ndarray)

_UNIT = 10_000
"""Shares are counted in whole parts of so many: the same bound for one token at a time as for all at once."""


@dataclass(frozen=True)
class Slots:
    """The chosen tokens.

    Attributes
    ----------
    index_BK: int64, the token in each slot, ascending; an empty slot holds some token that was not chosen.
    filled_BK: bool, whether the slot holds a chosen token.
    """

    index_BK: Tensor
    filled_BK: Tensor

    @property
    def count_B(self) -> Tensor:
        """Chosen tokens of each row, int64."""
        return self.filled_BK.sum(-1)


def share_of(count: int, rate: float) -> int:
    """ceil(rate * count), exact for any rate that has four decimals."""
    return (count * round(rate * _UNIT) + _UNIT - 1) // _UNIT


def top_k(scores_BT: Tensor, present_BT: Tensor, rate: float) -> Slots:
    """Of each row the ceil(rate * n) tokens of highest score, n without padding.

    What a token gets depends on later tokens. There are ceil(rate * T) slots, or one.
    """
    num_slots = max(1, share_of(scores_BT.shape[-1], rate))
    scores_BT = scores_BT.masked_fill(~present_BT, float("-inf"))
    index_BK = scores_BT.topk(num_slots, dim=-1, sorted=True).indices
    rank_K = torch.arange(num_slots, device=scores_BT.device)
    best_BK = rank_K < _shares(present_BT, rate)[:, None]
    wanted_BT = torch.zeros_like(present_BT).scatter(-1, index_BK, best_BK) & present_BT
    return first(wanted_BT, num_slots)


def kth_score(scores_BT: Tensor, present_BT: Tensor, rate: float) -> Tensor:
    """The lowest score among each row's `top_k`, averaged over the rows that hold a token; 0: none does."""
    num_slots = max(1, share_of(scores_BT.shape[-1], rate))
    best_BK = scores_BT.masked_fill(~present_BT, float("-inf")).topk(num_slots, dim=-1, sorted=True).values
    last_B = (_shares(present_BT, rate) - 1).clamp_min(0)
    found_B = best_BK.gather(-1, last_B[:, None])[:, 0]
    holds_B = present_BT.any(-1)
    return torch.where(holds_B, found_B, 0.0).sum() / holds_B.sum().clamp_min(1)


def _shares(present_BT: Tensor, rate: float) -> Tensor:
    return (present_BT.sum(-1) * round(rate * _UNIT) + _UNIT - 1) // _UNIT


def first(wanted_BT: Tensor, num_slots: int) -> Slots:
    """The wanted tokens in their order, as many as there are slots."""
    length = wanted_BT.shape[-1]
    place_T = torch.arange(length, device=wanted_BT.device)
    keys_BT = torch.where(wanted_BT, place_T, place_T + length)  # all different: the order is unique
    keys_BK = keys_BT.topk(num_slots, dim=-1, largest=False, sorted=True).values
    return Slots(keys_BK % length, keys_BK < length)


@dataclass(frozen=True)
class Budget:
    """How many tokens up to a position a layer may have processed: ceil(rate * (position + 1)) + burst.

    A function of the position alone, never of the sequence's length, which would let the future decide.
    """

    rate: float
    burst: int

    def at(self, positions: Positions) -> Positions:
        """The bound at each position, int64, exact for any rate that has four decimals."""
        return ((positions + 1) * round(self.rate * _UNIT) + _UNIT - 1) // _UNIT + self.burst

    def after(self, num_tokens: int) -> int:
        """The bound once `num_tokens` have been seen."""
        return min(num_tokens, share_of(num_tokens, self.rate) + self.burst)


def within_budget(
    wanted_BT: Tensor, positions_BT: Tensor, budget: Budget, used_B: Tensor | None = None
) -> Tensor:
    """The wanted tokens that the budget admits, in order: one that finds it spent is dropped.

    The number n admitted so far obeys n_t = min(n_(t-1) + wanted_t, bound_t). Unrolled, with M the running
    sum of `wanted`: n_t = M_t + min(used, min over s <= t of (bound_s - M_s)), a running minimum.

    Args:
        used_B: admitted tokens before these ones (a cache's length).
    """
    total_BT = wanted_BT.long().cumsum(-1)
    room_BT = budget.at(positions_BT) - total_BT
    start_B1 = torch.zeros_like(total_BT[:, :1]) if used_B is None else used_B[:, None]
    room_BT = torch.minimum(room_BT.cummin(-1).values, start_B1)
    admitted_BT = total_BT + room_BT
    before_BT = torch.cat([start_B1, admitted_BT[:, :-1]], dim=-1)
    return wanted_BT & (admitted_BT > before_BT)


def gather(values_BTX: Tensor, slots: Slots) -> Tensor:
    """The chosen tokens' values, (B, T, ...) -> (B, K, ...); a batch of 1 counts for every row."""
    batch, num_slots = slots.index_BK.shape
    tail = values_BTX.shape[2:]
    index = slots.index_BK.view(batch, num_slots, *[1] * len(tail)).expand(batch, num_slots, *tail)
    return values_BTX.expand(batch, *values_BTX.shape[1:]).gather(1, index)


def add_back(values_BTD: Tensor, slots: Slots, change_BKD: Tensor) -> Tensor:
    """`values` with each slot's change added to its token; empty slots change nothing."""
    change_BKD = change_BKD.masked_fill(~slots.filled_BK[..., None], 0.0)  # not times 0: it may be NaN
    index_BKD = slots.index_BK[..., None].expand_as(change_BKD)
    return values_BTD.scatter_add(1, index_BKD, change_BKD.to(values_BTD.dtype))
