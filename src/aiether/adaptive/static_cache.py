"""The compact cache in tensors of fixed size and place, for decoding steps that are compiled and replayed.

The host learns nothing of what the rows hold: every row writes its token into its next column, and only where
the layer processed the token does the row count it; else the next one takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .ledger import ALIGNED
from .selection import Budget, Slots


def _fixed(tensor: Tensor) -> Tensor:
    """The tensor, marked as one that stays where it is: CUDA graphs write into no other one.

    While a graph is traced it cannot be marked, as with transformers' static layers.
    """
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class StaticCompactLayer(CacheLayerMixin):
    """Keys and values of the tokens that a routed layer processed, with room for what its budget allows.

    Told what comes by `expect` (any number of tokens) or `take` (one), as `CompactLayer` is.

    Attributes
    ----------
    keys, values: (B, heads, capacity, head_dim); a row's columns from `used_B` on are nobody's.
    used_B, present_B: int64, tokens that each row holds, and those that went by, padding aside.
    cumulative_length: int64 scalar, tokens that went by, padding included.
    started: whether any did.

    Args:
        max_cache_len: tokens that a row may have, padding included.
    """

    is_compileable = True
    is_sliding = False
    used_B: Tensor
    present_B: Tensor
    cumulative_length: Tensor

    def __init__(self, budget: Budget, max_cache_len: int) -> None:
        super().__init__()
        self.budget, self.max_cache_len = budget, max_cache_len
        # One column more than are ever used: a full row, too, writes its token somewhere.
        self.capacity = -(-(budget.after(max_cache_len) + 1) // ALIGNED) * ALIGNED
        self.started = False
        self._counted = False
        self._slots: Slots | None = None
        self._admitted_B: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, heads = key_states.shape[:2]
        self._count_from_zero(self.batch_size, self.device)
        self.keys, self.values = (
            _fixed(each.new_zeros(self.batch_size, heads, self.capacity, each.shape[-1]))
            for each in (key_states, value_states)
        )
        self.is_initialized = True

    def _count_from_zero(self, batch: int, device: torch.device) -> None:
        """The counts are wanted before the first keys are there."""
        if not self._counted:
            self.used_B = _fixed(torch.zeros(batch, dtype=torch.long, device=device))
            self.present_B = _fixed(torch.zeros(batch, dtype=torch.long, device=device))
            self.cumulative_length = _fixed(torch.zeros((), dtype=torch.long, device=device))
            self._counted = True

    def num_slots(self, length: int) -> int:
        """How many of the next `length` tokens may be processed."""
        return min(length, self.budget.after(self.max_cache_len if self.started else length))

    def take(self, admitted_B: Tensor, present_B1: Tensor | None) -> Tensor:
        """Announce one token of every row; returns what it may attend to, bool (B, 1, 1, capacity).

        A row that does not admit its token attends and writes as the others do, and forgets it.
        """
        self._admitted_B = admitted_B
        self.present_B.add_(1 if present_B1 is None else present_B1[:, 0])
        self.cumulative_length.add_(1)
        column_C = torch.arange(self.capacity, device=admitted_B.device)
        return (column_C <= self.used_B[:, None])[:, None, None]

    def expect(self, slots: Slots, present_BT: Tensor) -> Tensor | None:
        """Announce the tokens that the next `update` brings; returns which columns each slot may attend to.

        bool (B, 1, K, capacity); None where the slots are the first tokens there are: causal among
        themselves.
        """
        batch, num_slots = slots.index_BK.shape
        self._count_from_zero(batch, slots.index_BK.device)
        self._slots, self._first = slots, not self.started
        self.started = True
        rank_K = torch.arange(num_slots, device=slots.index_BK.device)
        own_BK = self.used_B[:, None] + rank_K
        # Empty slots come last: what they write lies behind what counts, at the end of the room if need be.
        self._column_BK = torch.where(slots.filled_BK, own_BK, own_BK.clamp_max(self.capacity - 1))
        self.present_B.add_(present_BT.sum(-1))
        self.cumulative_length.add_(present_BT.shape[-1])
        if self._first:
            return None
        column_C = torch.arange(self.capacity, device=own_BK.device)
        return (column_C <= own_BK[..., None])[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the announced tokens, in place; returns what they attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self._admitted_B is not None:
            admitted_B, self._admitted_B = self._admitted_B, None
            self._write(self.used_B[:, None], None, key_states, value_states)
            self.used_B.add_(admitted_B)
            return self.keys, self.values
        assert self._slots is not None, "expect() or take() comes first"
        slots, self._slots = self._slots, None
        self._write(self._column_BK, slots.filled_BK, key_states, value_states)
        del self._column_BK
        self.used_B.add_(slots.count_B)
        return (key_states, value_states) if self._first else (self.keys, self.values)

    def _write(self, column_BK: Tensor, filled_BK: Tensor | None, *new: Tensor) -> None:
        # By index, not by scatter_: compiled, that one would copy the whole cache twice.
        row_B1 = torch.arange(len(column_BK), device=column_BK.device)[:, None]
        for held_BHCX, new_BHKX in zip((self.keys, self.values), new, strict=True):
            assert held_BHCX is not None
            written = new_BHKX.to(held_BHCX.dtype)
            if filled_BK is not None:  # padding's keys may be NaN, which no mask takes out of a product
                written = written.masked_fill(~filled_BK[:, None, :, None], 0.0)
            held_BHCX[row_B1, :, column_BK] = written.transpose(1, 2)

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Tokens that were seen, as transformers' static layer has it: a tensor, once there is one."""
        return self.cumulative_length if self._counted else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Nothing was seen; the tensors stay where they are."""
        super().reset()
        self.started = False
        if self._counted:
            self.used_B.zero_()
            self.present_B.zero_()
            self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, in place."""
        if self.is_initialized:
            for held in (self.keys, self.values, self.used_B, self.present_B):
                assert held is not None
                held.copy_(held.index_select(0, beam_idx.to(held.device)))
