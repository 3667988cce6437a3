"""The baseline's cost-quality curve, and what another arm's loss would have cost on it.

A curve goes through the baseline's runs of one seed at several lengths, each on a schedule of its own: a
loss in mid-flight, at a high learning rate, is not what a run of that length reaches. Between two lengths it
is straight in (log cost, loss). Outside of the lengths that were run nothing is said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MIN_POINTS = 3


class Point(NamedTuple):
    """One run at its end."""

    cost: float
    loss: float


def curve_of(points: Iterable[Point]) -> tuple[Point, ...]:
    """The runs that a curve goes through, cheapest first; empty when there are fewer than three."""
    found = tuple(sorted(points))
    return found if len(found) >= MIN_POINTS else ()


def cost_at(curve: Sequence[Point], loss: float) -> float | None:
    """The cost at which the curve first comes down to `loss`; None outside of it."""
    for shorter, longer in itertools.pairwise(curve):
        if longer.loss <= loss <= shorter.loss:
            if shorter.loss == longer.loss:
                return shorter.cost
            share = (shorter.loss - loss) / (shorter.loss - longer.loss)
            return math.exp(_between(math.log(shorter.cost), math.log(longer.cost), share))
    return None


def loss_at(curve: Sequence[Point], cost: float) -> float | None:
    """The curve's loss at `cost`; None outside of it."""
    for shorter, longer in itertools.pairwise(curve):
        if shorter.cost <= cost <= longer.cost:
            if shorter.cost == longer.cost:
                return shorter.loss
            share = math.log(cost / shorter.cost) / math.log(longer.cost / shorter.cost)
            return _between(shorter.loss, longer.loss, share)
    return None


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)
