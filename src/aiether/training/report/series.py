"""Series for drawing and for comparing: thinned, smoothed, framed, read off at equal compute. All pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiether.training.report.run_records import Run

Column = NDArray[np.float64]


def finite(x: ArrayLike, y: ArrayLike) -> tuple[Column, Column]:
    """The points of which both coordinates are finite."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def thin(x: ArrayLike, y: ArrayLike, limit: int = 1000) -> tuple[Column, Column]:
    """At most `limit` points that keep every extreme: the least and the greatest of each stretch.

    A picture of such a series cannot be told from one of the whole, spikes included. Points that are not
    finite are left out.
    """
    x, y = finite(x, y)
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(x), limit // 2 + 1).astype(int)
    picks = [
        start + offset
        for start, stop in pairwise(edges)
        for offset in sorted({int(y[start:stop].argmin()), int(y[start:stop].argmax())})
    ]
    return x[picks], y[picks]


def smooth(x: ArrayLike, y: ArrayLike, breaks: Sequence[float] = (), stretches: int = 50) -> Column:
    """Centred running mean over 1/`stretches` of the series, never across one of the `breaks` in x.

    Without the breaks the jump of the loss at a growth would be smeared over what came before it.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    half = max(1, len(y) // (2 * stretches))
    parts = np.split(y, np.searchsorted(x, np.asarray(breaks, dtype=np.float64), side="right"))
    return np.concatenate([_running_mean(part, half) for part in parts])


def _running_mean(y: Column, half: int) -> Column:
    if not len(y):
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    reach = np.minimum(half, np.minimum(index, len(y) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def frame(series: Sequence[Column], skip: float = 0.04, quantile: float = 0.99) -> tuple[float, float] | None:
    """Limits of an axis for losses: all of the minimum, but neither the first descent nor a rare spike.

    None when nothing finite is left.
    """
    kept = [y[int(len(y) * skip) :] for y in (values[np.isfinite(values)] for values in series) if len(y)]
    if not kept:
        return None
    low = min(float(y.min()) for y in kept)
    high = max(float(np.quantile(y, quantile)) for y in kept)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


@dataclass(frozen=True)
class Comparison:
    """A run against one baseline, both read off where both have been measured.

    Attributes:
        flops: Compute at which the losses are compared: where the shorter of the two ends.
        loss, baseline_loss: Evaluation losses there, in nats, interpolated between evaluations.
        target: The least loss that both have reached.
        flops_to_target, baseline_flops_to_target: What each had spent when it first reached `target`.
    """

    name: str
    flops: float
    loss: float
    baseline_loss: float
    target: float
    flops_to_target: float
    baseline_flops_to_target: float

    @property
    def difference(self) -> float:
        return self.loss - self.baseline_loss

    @property
    def saving(self) -> float:
        """Share of the baseline's compute that the run did without; negative if it needed more."""
        return 1.0 - self.flops_to_target / self.baseline_flops_to_target


def compare(run: Run, baseline: Run) -> Comparison | None:
    """Both runs at equal compute and at equal loss; None where they share no measured range of compute."""
    mine, theirs = _loss_curve(run), _loss_curve(baseline)
    if not len(mine[0]) or not len(theirs[0]):
        return None
    flops = min(mine[0][-1], theirs[0][-1])
    if flops < max(mine[0][0], theirs[0][0]):
        return None
    target = max(mine[1].min(), theirs[1].min())
    return Comparison(
        name=baseline.name,
        flops=float(flops),
        loss=float(np.interp(flops, *mine)),
        baseline_loss=float(np.interp(flops, *theirs)),
        target=float(target),
        flops_to_target=cost_to_reach(*mine, target=float(target)),
        baseline_flops_to_target=cost_to_reach(*theirs, target=float(target)),
    )


def cost_to_reach(costs: Column, losses: Column, *, target: float) -> float:
    """Cost at which the loss first comes down to `target`, interpolated; infinite if it never does."""
    reached = np.flatnonzero(losses <= target)
    if not reached.size:
        return float("inf")
    first = int(reached[0])
    if first == 0:
        return float(costs[0])
    pair = slice(first - 1, first + 1)
    return float(np.interp(-target, -losses[pair], costs[pair]))


def costs_to_target(run: Run, baseline: Run, columns: Sequence[str]) -> tuple[float, dict[str, Costs]]:
    """The least loss that both reach, and what each had spent by then; NaN and nothing where none is.

    A column that one of the two has not recorded is left out.
    """
    least = [losses.min() for each in (run, baseline) if len(losses := _loss_curve(each, "step")[1])]
    if len(least) < 2:
        return float("nan"), {}
    target = float(max(least))
    spent: dict[str, Costs] = {}
    for column in columns:
        curves = _loss_curve(run, column), _loss_curve(baseline, column)
        costs = [cost_to_reach(*curve, target=target) for curve in curves]
        if all(map(np.isfinite, costs)):
            spent[column] = Costs(*costs)
    return target, spent


@dataclass(frozen=True)
class Costs:
    """What a run and a baseline spent on the same loss."""

    run: float
    baseline: float

    @property
    def saving(self) -> float:
        """Share of the baseline's cost that the run did without; negative if it needed more."""
        return 1.0 - self.run / self.baseline if self.baseline else 0.0


def _loss_curve(run: Run, x: str = "flops") -> tuple[Column, Column]:
    return finite(run.evals.column(x), run.evals.column("eval_loss"))
