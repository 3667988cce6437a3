"""Windows of tokens for training and evaluation, addressed by one integer."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aiether.data.tokens import TokenFile


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Consecutive, non-overlapping windows of `context_length` tokens (a shorter tail is left out).

    With a seed it is as long as `num_windows` says, over as many epochs as that takes (None: one epoch),
    each epoch in an order of its own; window i depends on (seed, i) alone, so a position in the data is
    one integer. With seed None the windows come in the order of the file, at most once each; if
    `num_windows` asks for fewer than there are, they are spread evenly over the file, since neighbouring
    windows tend to belong to one document.

    An item is {"input_ids": (T,), "labels": (T,)}, int64, equal: Hugging Face models shift the labels.

    Raises ValueError when the file holds less than one window.
    """

    def __init__(
        self, tokens: TokenFile, context_length: int, seed: int | None, num_windows: int | None = None
    ) -> None:
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}; at least 2 is needed to predict a token")
        self.tokens = tokens
        self.context_length = context_length
        self.seed = seed
        self.windows_per_epoch = len(tokens) // context_length
        if self.windows_per_epoch == 0:
            raise ValueError(
                f"{tokens.path.stem} data holds {len(tokens)} tokens, less than one window of context_length "
                f"{context_length}; give more text, a shorter context_length"
                + (" or a larger validation_fraction" if tokens.path.stem == "validation" else "")
            )
        self._length = self.windows_per_epoch if num_windows is None else num_windows
        if seed is None:
            self._length = min(self._length, self.windows_per_epoch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.window(index) * self.context_length
        ids = torch.from_numpy(self.tokens[start : start + self.context_length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """The items of a batch, as torch's loader asks for them: one conversion instead of one an item.

        The two tensors of an item share memory here, which the collator's copy ends.
        """
        starts = [self.window(index) * self.context_length for index in indices]
        stacked = np.stack([self.tokens[start : start + self.context_length] for start in starts])
        return [{"input_ids": ids, "labels": ids} for ids in torch.from_numpy(stacked.astype(np.int64))]

    def window(self, index: int) -> int:
        """Which window of the file item `index` is, in [0, windows_per_epoch)."""
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        if self.seed is None:
            return index * self.windows_per_epoch // self._length
        epoch, offset = divmod(index, self.windows_per_epoch)
        return int(permutation(self.seed, epoch, self.windows_per_epoch)[offset])


@lru_cache(maxsize=4)  # two datasets may stand at the border of two epochs
def permutation(seed: int, epoch: int, length: int) -> npt.NDArray[Any]:
    """The order of an epoch: the numbers below `length`, sorted by a hash keyed with (seed, epoch).

    The hash is SplitMix64 (Steele et al. 2014), written out here so that a run resumed under another
    version of NumPy sees the same data. 8 bytes a window; an epoch's order is computed once.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest(), "little")
    mixed = (np.arange(length, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        key
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
    order.setflags(write=False)
    return order
