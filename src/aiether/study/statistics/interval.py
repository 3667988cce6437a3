"""Mean and t interval over seeds, of values that some seeds may lack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from aiether.study.statistics.values import Values, as_values, check_share


@dataclass(frozen=True)
class MeanInterval:
    """n values that are known, how many are missing; None where too few are known."""

    n: int
    missing: int
    mean: float | None
    sd: float | None  # with n - 1
    ci95: tuple[float, float] | None


def mean_interval(values: Sequence[float | None], *, level: float = 0.95) -> MeanInterval:
    """Over the values that are not None. A share of FLOPs saved is one value a seed.

    Raises ValueError for NaN or infinity.
    """
    known = as_values([value for value in values if value is not None])
    mean = float(known.mean()) if known.size else None
    sd = spread(known)
    ci = t_interval(known, level)
    return MeanInterval(known.size, len(values) - known.size, mean, sd, ci)


def spread(values: np.ndarray) -> float | None:
    """The standard deviation with n - 1; exactly 0 where all are equal, None for fewer than two."""
    if values.size < 2:
        return None
    return float(values.std(ddof=1)) if np.ptp(values) > 0 else 0.0


def t_interval(values: Values, level: float = 0.95) -> tuple[float, float] | None:
    """mean ± t * sd / sqrt(n) with n - 1 degrees of freedom; None for fewer than two values."""
    check_share(level, "level")
    known = as_values(values)
    sd = spread(known)
    if sd is None:
        return None
    half = _quantile(level, known.size - 1) * sd / math.sqrt(known.size)
    mean = float(known.mean())
    return mean - half, mean + half


@lru_cache(maxsize=1024)
def _quantile(level: float, degrees: int) -> float:
    return float(stats.t.isf((1.0 - level) / 2.0, degrees))
