"""The loss of a causal model over windows of a text: sums by position, weighted by tokens and unclamped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of, evaluating
from aiether.evaluation.quality import perplexity
from aiether.evaluation.windows import Window

Counted = tuple[Tensor, int | Tensor]
"""The ids of a window, int64 (T,), and the first of them that counts (at least 1), or which do, bool (T,)."""


@dataclass(frozen=True)
class Bucket:
    """Mean loss (nats) of the tokens that are predicted from `start` to `stop - 1` tokens before them."""

    start: int
    stop: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class LossSums:
    """What windows add up to.

    Attributes
    ----------
    losses: (T,) float64: the summed loss, in nats, of the tokens at each place of a window. Place p is
        predicted from the p tokens before it; place 0 is never predicted.
    counts: (T,) int64: how many tokens that is.
    window_losses, window_counts: (windows,) float64 and int64: the same by window, in their order.
    inputs: tokens that went through the model, those included that do not count.
    """

    losses: Tensor
    counts: Tensor
    window_losses: Tensor
    window_counts: Tensor
    inputs: int

    @property
    def windows(self) -> int:
        """How many windows there were."""
        return len(self.window_counts)

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
        For no window, for a loss that is NaN, and where the device cannot compute the model in bfloat16.
    """
    check_bf16(model, bf16)
    forward, device, adder = Forward(model), device_of(model), LossAdder("loss")
    with evaluating(model), products(device, bf16):
        for ids, counted in batches(windows, batch_size):
            there = ids.to(device)
            adder.add(token_losses(forward(there), there), counted)
    return adder.sums()


def check_bf16(model: nn.Module, bf16: bool) -> None:
    """Raises ValueError for bfloat16 of a model in float16 on a CPU, whose norms cannot mix the two."""
    halves = bf16 and any(p.dtype is torch.float16 for p in model.parameters())
    if halves and device_of(model).type == "cpu":
        raise ValueError(
            "bf16 is asked for, and the model is in float16, whose norms a CPU cannot compute in bfloat16: "
            "leave bf16 out, or load the model in another type"
        )


def products(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def text_windows(tokens: Any, places: Iterable[Window]) -> Iterator[Counted]:
    """The ids of windows, one by one, out of `tokens`: whatever gives an array of ids for a slice."""
    for start, stop, first in places:
        yield torch.from_numpy(np.asarray(tokens[start:stop]).astype(np.int64)), first


def batches(windows: Iterable[Counted], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbours of equal length together: ids, int64 (B, T), and which of them count, bool (B, T)."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for length, alike in groupby(windows, key=lambda window: len(window[0])):
        while batch := list(islice(alike, batch_size)):
            counted = [_mask(count, length) for _, count in batch]
            yield torch.stack([ids for ids, _ in batch]), torch.stack(counted)


def _mask(counted: int | Tensor, length: int) -> Tensor:
    if isinstance(counted, int):
        return torch.arange(length) >= counted
    if counted.shape != (length,) or counted.dtype != torch.bool or counted[:1].any():
        raise ValueError(
            f"what counts in a window of {length} tokens is {counted.dtype} {tuple(counted.shape)}; needed "
            "is a number, or a bool for every token, False for the first, which nothing predicts"
        )
    return counted


def token_losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """The loss of each token but the first of its window: float64 (B, T), 0 at the first, on the CPU."""
    # Row by row: a float32 copy of a whole batch's logits may be the largest thing in memory.
    rows = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
        for row, ids in zip(logits_BTV, ids_BT, strict=True)
    ]
    return F.pad(torch.stack(rows).cpu().double(), (1, 0))  # not every device has float64


class LossAdder:
    """Adds up what each token of each window has, by place and by window; `what` names it in a message."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._losses, self._counts = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        self._window_losses: list[Tensor] = []
        self._window_counts: list[Tensor] = []
        self._inputs = 0

    def add(self, losses_BT: Tensor, counted_BT: Tensor) -> None:
        """One batch: float64 and bool (B, T)."""
        losses, length = losses_BT.where(counted_BT, 0.0), losses_BT.shape[1]
        if length > len(self._losses):
            missing = (0, length - len(self._losses))
            self._losses, self._counts = F.pad(self._losses, missing), F.pad(self._counts, missing)
        self._losses[:length] += losses.sum(0)
        self._counts[:length] += counted_BT.sum(0)
        self._window_losses.append(losses.sum(1))
        self._window_counts.append(counted_BT.sum(1))
        self._inputs += losses_BT.numel()

    def sums(self) -> LossSums:
        """All so far. Raises ValueError for no window, nothing that counts, and NaN."""
        if not self._window_counts:
            raise ValueError("there is no window to evaluate")
        if not self._counts.any():
            raise ValueError("no token of the windows counts; give longer ones")
        if self._losses.isnan().any():
            raise ValueError(
                f"the model's {self._what} is NaN: its training diverged or its weights are damaged; take an "
                "earlier checkpoint"
            )
        by_window = torch.cat(self._window_losses), torch.cat(self._window_counts)
        return LossSums(self._losses, self._counts, *by_window, self._inputs)
