"""What one arm reached over its seeds, and over several tasks.

Runs are always given by task: a mapping from a task's name to the values of its seeds. There is no array
whose axes could be taken for one another: seeds are resampled within a task, tasks never are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from aiether.study.statistics.interval import spread, t_interval
from aiether.study.statistics.values import Values, as_values, check_share

NUM_RESAMPLES = 20_000
TRIMMED = 0.25


@dataclass(frozen=True)
class Summary:
    """One arm over its n seeds; None where n is too small."""

    n: int
    mean: float | None
    sd: float | None  # with n - 1
    ci95: tuple[float, float] | None  # t interval of the mean
    median: float | None
    iqm: float | None
    iqm_ci95: tuple[float, float] | None  # percentile bootstrap: too narrow for few seeds


def summarise(values: Values, *, seed: int = 0) -> Summary:
    """Of one value a seed, shape (n,); `seed` is the bootstrap's. Raises ValueError for NaN or infinity."""
    known = as_values(values)
    if not known.size:
        return Summary(0, None, None, None, None, None, None)
    interval = bootstrap_iqm({"": known}, seed=seed) if known.size > 1 else None
    return Summary(
        n=known.size,
        mean=float(known.mean()),
        sd=spread(known),
        ci95=t_interval(known),
        median=float(np.median(known)),
        iqm=iqm({"": known}),
        iqm_ci95=interval,
    )


def iqm(by_task: Mapping[str, Values]) -> float:
    """The interquartile mean of all runs of all tasks together.

    A quarter of the runs is dropped at each end, rounded down: with fewer than four runs it is the mean.
    Tasks count by their numbers of runs and must have one scale.
    """
    pooled = np.concatenate(list(_tasks(by_task).values()))
    return float(stats.trim_mean(pooled, TRIMMED))


def bootstrap_iqm(
    by_task: Mapping[str, Values], *, seed: int = 0, resamples: int = NUM_RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of `iqm`: each task's seeds are drawn anew, with replacement, within the task.

    Args:
        by_task: for each task the values of its seeds, shape (n,); n may differ.
        seed: of the generator; the same seed gives the same interval.

    With few seeds it covers less often than `level` says (docs/statistics.md has how often). Raises
    ValueError without tasks, for a task without runs, NaN or infinity.
    """
    check_share(level, "level")
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(known, (resamples, known.size)) for known in _tasks(by_task).values()]
    statistics = stats.trim_mean(np.concatenate(drawn, axis=1), TRIMMED, axis=1)
    return _percentiles(statistics, level)


@dataclass(frozen=True)
class Improvement:
    """How often a run of the arm beats one of the other; 0.5 is no difference."""

    probability: float
    ci95: tuple[float, float]  # percentile bootstrap


def probability_of_improvement(
    arm: Mapping[str, Values],
    against: Mapping[str, Values],
    *,
    higher_is_better: bool = False,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> Improvement:
    """P(a run of `arm` is better than a run of `against`), ties half, averaged over tasks.

    It is Mann and Whitney's U over the number of pairs. Seeds are not paired: for the interval both arms' are
    drawn anew, within each task. Raises ValueError unless both arms have the same tasks, each with runs.
    """
    ours, theirs = _tasks(arm), _tasks(against)
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"tasks {sorted(ours)} of one arm and {sorted(theirs)} of the other; they must be the same"
        )
    rng = np.random.default_rng(seed)
    shares, drawn = [], []
    for task, a in ours.items():
        b = theirs[task]
        sign = 1.0 if higher_is_better else -1.0
        won = (np.sign(sign * (a[:, None] - b[None, :])) + 1.0) / 2.0
        shares.append(float(won.mean()))
        of_a = rng.multinomial(a.size, np.full(a.size, 1.0 / a.size), resamples)
        of_b = rng.multinomial(b.size, np.full(b.size, 1.0 / b.size), resamples)
        drawn.append(((of_a @ won) * of_b).sum(axis=1) / won.size)
    return Improvement(float(np.mean(shares)), _percentiles(np.mean(drawn, axis=0), 0.95))


def _tasks(by_task: Mapping[str, Values]) -> dict[str, np.ndarray]:
    known = {task: as_values(values, f"values of task {task!r}") for task, values in by_task.items()}
    empty = [task for task, values in known.items() if not values.size]
    if empty or not known:
        raise ValueError(
            f"task {empty[0]!r} has no runs" if empty else "no tasks; give at least one with its runs"
        )
    return known


def _percentiles(statistics: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(statistics, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)
