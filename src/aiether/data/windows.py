"""Windows of tokens for training and evaluation, addressed by one integer."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aiether.data.mixture import Schedule, TokenMixture
from aiether.data.tokens import TokenFile


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Consecutive, non-overlapping windows of `context_length` tokens (a shorter tail is left out).

    With a seed it is as long as `num_windows` says, over as many epochs as that takes (None: one epoch),
    each epoch in an order of its own; window i depends on (seed, i) alone, so a position in the data is
    one integer. With seed None the windows come in the order of the file, at most once each; if
    `num_windows` asks for fewer than there are, they are spread evenly over the file, since neighbouring
    windows tend to belong to one document.

    Of a mixture, window i comes from the source that its `Schedule` names, in that source's own order: a
    source may be in its third epoch while another is in its first. With seed None as many windows are
    given as the shares allow without repeating one.

    An item is {"input_ids": (T,), "labels": (T,)}, int64, equal: Hugging Face models shift the labels.

    Raises ValueError when the file, or a part of the mixture, holds less than one window.
    """

    def __init__(
        self,
        tokens: TokenFile | TokenMixture,
        context_length: int,
        seed: int | None,
        num_windows: int | None = None,
    ) -> None:
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}; at least 2 is needed to predict a token")
        self.tokens = tokens
        self.context_length = context_length
        self.seed = seed
        parts = tokens.parts if isinstance(tokens, TokenMixture) else (tokens,)
        self._schedule = Schedule(tokens.shares) if isinstance(tokens, TokenMixture) else None
        self._orders = [_Order(part, context_length, seed, number) for number, part in enumerate(parts)]
        self.windows_per_epoch = sum(order.available for order in self._orders)
        self._length = self.windows_per_epoch if num_windows is None else num_windows
        if seed is None:
            self._spread()

    def _spread(self) -> None:
        available = [order.available for order in self._orders]
        longest = available[0] if self._schedule is None else self._schedule.longest(available)
        self._length = min(self._length, longest)
        taken = [self._length] if self._schedule is None else self._schedule.taken(self._length)
        for order, number in zip(self._orders, taken, strict=True):
            order.taken = number

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self._window(index).astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """The items of a batch, as torch's loader asks for them: one conversion instead of one an item.

        The two tensors of an item share memory here, which the collator's copy ends.
        """
        stacked = np.stack([self._window(index) for index in indices])
        return [{"input_ids": ids, "labels": ids} for ids in torch.from_numpy(stacked.astype(np.int64))]

    def _window(self, index: int) -> npt.NDArray[Any]:
        source, window = self.locate(index)
        start = window * self.context_length
        return self._orders[source].tokens[start : start + self.context_length]

    def window(self, index: int) -> int:
        """Which window of its file item `index` is."""
        return self.locate(index)[1]

    def locate(self, index: int) -> tuple[int, int]:
        """The source of item `index`, and which window of that source's file it is."""
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        source, place = (0, index) if self._schedule is None else self._schedule.locate(index)
        return source, self._orders[source].window(place)


class _Order:
    """The order in which one file's windows come: by epochs, or spread evenly over the file."""

    def __init__(self, tokens: TokenFile, context_length: int, seed: int | None, source: int) -> None:
        self.tokens = tokens
        self.available = len(tokens) // context_length
        self.taken = self.available
        self._seed, self._source = seed, source
        self._epochs: dict[int, npt.NDArray[Any]] = {}
        if self.available == 0:
            raise ValueError(
                f"{tokens.name} data holds {len(tokens)} tokens, less than one window of context_length "
                f"{context_length}; give more text, a shorter context_length"
                + (" or a larger validation_fraction" if tokens.name.startswith("validation") else "")
            )

    def window(self, place: int) -> int:
        """The window at a place of the order."""
        if self._seed is None:
            return place * self.available // self.taken
        epoch, offset = divmod(place, self.available)
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch may stand at the border of two epochs
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = permutation(self._seed, epoch, self.available, self._source)
        return int(self._epochs[epoch][offset])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


def permutation(seed: int, epoch: int, length: int, source: int = 0) -> npt.NDArray[Any]:
    """The order of an epoch: the numbers below `length`, sorted by a hash keyed with seed, epoch and source.

    The hash is SplitMix64 (Steele et al. 2014), written out here so that a run resumed under another
    version of NumPy sees the same data. 8 bytes a window.
    """
    words = f"{seed} {epoch}" + (f" {source}" if source else "")
    key = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")
    mixed = (np.arange(length, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        key
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
    order.setflags(write=False)
    return order
