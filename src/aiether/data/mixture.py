"""Several sources as one: which source a window comes from, and which of its windows it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiether.data.tokens import TokenFile

CYCLE = 1 << 16
"""Windows after which the order of the sources repeats: shares are kept to 1 / CYCLE."""


@dataclass(frozen=True)
class TokenMixture:
    """Tokens of several sources and the share of the windows that each gives.

    Attributes:
        parts: the tokens of each source.
        shares: positive, with sum 1.
    """

    parts: tuple[TokenFile, ...]
    shares: tuple[float, ...]

    def __len__(self) -> int:
        """Tokens of all sources together, each counted once."""
        return sum(map(len, self.parts))


class Schedule:
    """For every window of a mixture, its source and its number among that source's windows.

    Within a cycle the k-th window of a source that has c of them is due at (k + 1/2) / c, and windows come
    in the order in which they are due: after any number of windows each source has had its share of them to
    within about one. Nothing is drawn, so a position in a mixture is one integer.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.counts = _counts(shares)
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts.tolist()])
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        order = np.argsort(due, kind="stable")
        self._source: npt.NDArray[Any] = sources[order]
        self._rank = np.empty(len(order), dtype=np.int64)
        for source, count in enumerate(self.counts.tolist()):
            self._rank[self._source == source] = np.arange(count)

    def locate(self, index: int) -> tuple[int, int]:
        """The source of window `index`, and the number of windows that the source gave before it."""
        cycle, offset = divmod(index, len(self._source))
        source = int(self._source[offset])
        return source, cycle * int(self.counts[source]) + int(self._rank[offset])

    def taken(self, length: int) -> list[int]:
        """How many of the first `length` windows each source gives."""
        cycle, offset = divmod(length, len(self._source))
        part = np.bincount(self._source[:offset], minlength=len(self.counts))
        return (cycle * self.counts + part).tolist()

    def longest(self, available: Sequence[int]) -> int:
        """The most windows for which no source has to give more than it has."""
        low, high = 0, sum(available)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(n <= most for n, most in zip(self.taken(middle), available, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _counts(shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Windows of each source in a cycle: the shares rounded to CYCLE parts, each at least one."""
    exact = np.asarray(shares, dtype=np.float64) / sum(shares) * CYCLE
    return np.maximum(1, np.rint(exact)).astype(np.int64)
