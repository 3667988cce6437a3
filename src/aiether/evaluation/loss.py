"""The loss of a causal model over windows of a text: sums by position, weighted by tokens and unclamped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of, evaluating
from aiether.evaluation.windows import Window

Counted = tuple[Tensor, int]
"""The ids of a window, int64 (T,), and the first of them that counts (at least 1)."""


@dataclass(frozen=True)
class Bucket:
    """Mean loss (nats) of the tokens that are predicted from `start` to `stop - 1` tokens before them."""

    start: int
    stop: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class LossSums:
    """What windows add up to.

    Attributes
    ----------
    losses: (T,) float64: the summed loss, in nats, of the tokens at each place of a window. Place p is
        predicted from the p tokens before it; place 0 is never predicted.
    counts: (T,) int64: how many tokens that is.
    windows: how many windows there were.
    inputs: tokens that went through the model, those included that do not count.
    """

    losses: Tensor
    counts: Tensor
    windows: int
    inputs: int

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean loss per predicted token, in nats."""
        return float(self.losses.sum()) / self.tokens

    def buckets(self) -> tuple[Bucket, ...]:
        """The loss by how much of the text stands before a token: 1, 2 to 3, 4 to 7 tokens and so on."""
        return tuple(self._buckets())

    def _buckets(self) -> Iterator[Bucket]:
        start, length = 1, len(self.counts)
        while start < length:
            stop = min(2 * start, length)
            tokens = int(self.counts[start:stop].sum())
            if tokens:
                yield Bucket(start, stop, tokens, float(self.losses[start:stop].sum()) / tokens)
            start = stop


def sum_losses(
    model: nn.Module, windows: Iterable[Counted], *, batch_size: int = 8, bf16: bool = False
) -> LossSums:
    """Run windows through a model in evaluation mode, which it leaves as it was.

    Parameters
    ----------
    model: as for `check_conformance`; it shifts nothing: token i + 1 is predicted by the logits at i.
    windows: in any order and of any lengths; neighbours of equal length share a batch, none is padded.
    batch_size: windows in a batch.
    bf16: products in bfloat16 (autocast); the loss itself is computed in float32 and summed in float64.

    Raises
    ------
    ValueError
        For no window, and for a loss that is NaN.
    """
    forward, device = Forward(model), device_of(model)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    losses, counts = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    number = inputs = 0
    with evaluating(model), autocast:
        for batch in _batches(windows, batch_size):
            ids = torch.stack([ids for ids, _ in batch])
            first = torch.tensor([first for _, first in batch])
            length = ids.shape[1]
            if length > len(losses):
                losses, counts = (F.pad(sums, (0, length - len(sums))) for sums in (losses, counts))
            counted = torch.arange(length) >= first[:, None]
            found = _token_losses(forward, ids.to(device)).cpu()
            losses[:length] += found.where(counted, 0.0).sum(0)
            counts[:length] += counted.sum(0)
            number, inputs = number + len(batch), inputs + ids.numel()
    if not number:
        raise ValueError("there is no window to evaluate")
    if losses.isnan().any():
        raise ValueError(
            "the model's loss is NaN: its training diverged or its weights are damaged; take an earlier "
            "checkpoint"
        )
    return LossSums(losses, counts, number, inputs)


def text_windows(tokens: Any, places: Iterable[Window]) -> Iterator[Counted]:
    """The ids of windows, one by one, out of `tokens`: whatever gives an array of ids for a slice."""
    for start, stop, first in places:
        yield torch.from_numpy(np.asarray(tokens[start:stop]).astype(np.int64)), first


def _batches(windows: Iterable[Counted], batch_size: int) -> Iterator[list[Counted]]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for _, alike in groupby(windows, key=lambda window: len(window[0])):
        while batch := list(islice(alike, batch_size)):
            yield batch


def _token_losses(forward: Forward, ids_BT: Tensor) -> Tensor:
    """The loss of each token but the first of its window: float64 (B, T), 0 at the first."""
    logits = forward(ids_BT)
    # Row by row: a float32 copy of a whole batch's logits may be the largest thing in memory.
    rows = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
        for row, ids in zip(logits, ids_BT, strict=True)
    ]
    return F.pad(torch.stack(rows).double(), (1, 0))
