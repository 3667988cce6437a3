"""What a compact cache holds, counted on the host, and one more token of some of its rows.

While text is generated token by token, a layer's decisions are a few numbers a step. Read back once, they
tell which rows to run, where to write and how far to attend, without a kernel for each of these questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16
"""Attention kernels want masks of so many columns, or a multiple of it."""


@dataclass
class Ledger:
    """Rows of a `CompactLayer` (see its attributes), and the score above which its layer wants a token."""

    used_B: np.ndarray
    present_B: np.ndarray
    places_BC: np.ndarray
    threshold: float

    @classmethod
    def of(cls, used_B: Tensor, present_B: Tensor, places_BC: Tensor, threshold: Tensor | None) -> Ledger:
        """A copy of a cache's tensors."""
        both_BX = torch.cat([used_B[:, None], present_B[:, None], places_BC], 1).cpu().numpy()
        exceeded = 0.0 if threshold is None else threshold.item()
        return cls(both_BX[:, 0].copy(), both_BX[:, 1].copy(), both_BX[:, 2:].copy(), exceeded)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The cache's tensors again."""
        used, present, places = (
            torch.from_numpy(each.copy()).to(device) for each in (self.used_B, self.present_B, self.places_BC)
        )
        return used, present, places

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows, in this order."""
        self.used_B, self.present_B = self.used_B[rows], self.present_B[rows]
        self.places_BC = self.places_BC[rows]

    def enter(
        self, wanted_B: np.ndarray, present_B: np.ndarray, bound_B: np.ndarray, place: int
    ) -> np.ndarray:
        """Count one token of each row; returns the rows whose token is wanted and finds room, int64 (A,)."""
        rows_A = np.flatnonzero(wanted_B & present_B & (self.used_B < bound_B))
        self.present_B += present_B
        if len(rows_A):
            column_A = self.used_B[rows_A]
            missing = column_A.max() + 1 - self.places_BC.shape[1]
            if missing > 0:  # by a half at least: the buffers are copied whole when they grow
                missing = max(missing, self.places_BC.shape[1] // 2)
                missing += -(self.places_BC.shape[1] + missing) % ALIGNED
                self.places_BC = np.pad(self.places_BC, ((0, 0), (0, missing)))
            self.places_BC[rows_A, column_A] = place
            self.used_B[rows_A] += 1
        return rows_A

    def turn(self, rows_A: np.ndarray, heads: int, window: int | None, like: Tensor) -> Turn:
        """What `enter` has just counted, as the cache and the attention take it."""
        batch, capacity = self.places_BC.shape
        used_A = self.used_B[rows_A]
        longest = int(used_A.max())
        allowed_AN = self._allowed(rows_A, used_A, longest, window)
        if allowed_AN is not None:
            longest = allowed_AN.shape[1]
        # The cell that a row's head writes, in keys seen as (B * heads * capacity, head_dim).
        cells_AH = (rows_A[:, None] * heads + np.arange(heads)) * capacity + used_A[:, None] - 1
        sent = torch.from_numpy(np.concatenate([rows_A, cells_AH.ravel()])).to(like.device, non_blocking=True)
        mask_A11N = None
        if allowed_AN is not None:
            mask = torch.zeros(len(rows_A), 1, 1, longest, dtype=like.dtype)
            mask.masked_fill_(torch.from_numpy(~allowed_AN)[:, None, None], torch.finfo(like.dtype).min)
            mask_A11N = mask.to(like.device, non_blocking=True)
        rows = None if len(rows_A) == batch else sent[: len(rows_A)]
        return Turn(rows, sent[len(rows_A) :], longest, capacity, mask_A11N)

    def _allowed(
        self, rows_A: np.ndarray, used_A: np.ndarray, longest: int, window: int | None
    ) -> np.ndarray | None:
        """The columns that each row's token attends to, bool (A, N); None: to all of the `longest`."""
        near_AC: np.ndarray | None = None
        if window is not None:
            places_AC = self.places_BC[rows_A]
            near_AC = places_AC[np.arange(len(rows_A)), used_A - 1][:, None] - places_AC < window
        outside = near_AC is not None and not near_AC[:, 0].all()  # places ascend: the first is the farthest
        if not outside and (used_A == longest).all():
            return None
        columns = min(-(-longest // ALIGNED) * ALIGNED, self.places_BC.shape[1])
        allowed_AN = np.arange(columns) < used_A[:, None]
        if near_AC is not None:
            allowed_AN &= near_AC[:, :columns]
        return allowed_AN


@dataclass
class Turn:
    """One token of A rows.

    Attributes
    ----------
    rows_A: int64, which; None: all.
    cells: int64 (A * heads,), where their keys and values go.
    columns: how many columns of the cache they attend to.
    capacity: how many it must have.
    mask_A11N: added to the attention's scores; None: every row attends to all of the columns.
    """

    rows_A: Tensor | None
    cells: Tensor
    columns: int
    capacity: int
    mask_A11N: Tensor | None

    def made_room(self, held_BHCX: Tensor) -> Tensor:
        """The cache's keys or values with the capacity that is needed, where they may be written in place."""
        missing = self.capacity - held_BHCX.shape[2]
        if missing > 0:
            return torch.nn.functional.pad(held_BHCX, (0, 0, 0, missing))
        if held_BHCX.is_inference() and not torch.is_inference_mode_enabled():
            return held_BHCX.clone()
        return held_BHCX

    def write(self, held_BHCX: Tensor, new_AH1X: Tensor) -> Tensor:
        """Write into the cache, in place; returns what the rows attend to, (A, heads, columns, head_dim)."""
        size = held_BHCX.shape[-1]
        held_BHCX.view(-1, size).index_copy_(0, self.cells, new_AH1X.reshape(-1, size).to(held_BHCX.dtype))
        seen = held_BHCX[:, :, : self.columns]
        return seen if self.rows_A is None else seen.index_select(0, self.rows_A)

    def of_rows(self, values_BX: Tensor) -> Tensor:
        """The rows' values; a batch of 1 counts for every row."""
        if self.rows_A is None or len(values_BX) == 1:
            return values_BX
        return values_BX.index_select(0, self.rows_A)
