"""Differences of two arms over the same seeds: size, interval and tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from scipy import optimize, stats

from aiether.study.statistics.interval import spread, t_interval
from aiether.study.statistics.sign_flip import sign_flip_p, smallest_p
from aiether.study.statistics.values import Values, as_values, check_share

POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """One comparison over n seeds, arm minus the one it is compared with; None is what n seeds cannot give.

    With no spread at all (sd 0) the t test's p is its limit, 1 where every difference is 0 and else 0, and dz
    is None.
    """

    n: int
    mean: float | None
    sd: float | None  # of the differences, with n - 1
    ci95: tuple[float, float] | None  # t interval of the mean
    t_p: float | None  # two-sided paired t test
    sign_flip_p: float  # two-sided, by the mean
    dz: float | None  # mean / sd
    smallest_p: float  # that a sign-flip test over n seeds can give
    detectable: float | None  # true difference that the t test at alpha finds with power 0.8, by sd and n


def paired(differences: Values, *, alpha: float = 0.05) -> Paired:
    """Tests of the mean of one difference for each seed against 0.

    Args:
        differences: shape (n,), in the metric's unit, any order.
        alpha: the level at which `detectable` is taken; the interval is a 95 % one whatever alpha is.

    Raises ValueError for NaN, infinity, another shape, or an alpha outside (0, 1).
    """
    check_share(alpha, "alpha")
    known = as_values(differences, "differences")
    n, sd = known.size, spread(known)
    mean = float(known.mean()) if n else None
    return Paired(
        n=n,
        mean=mean,
        sd=sd,
        ci95=t_interval(known),
        t_p=None if sd is None or mean is None else _t_p(mean, sd, n),
        sign_flip_p=sign_flip_p(known),
        dz=mean / sd if sd and mean is not None else None,
        smallest_p=smallest_p(n),
        detectable=None if sd is None else sd * detectable_dz(n, alpha),
    )


def _t_p(mean: float, sd: float, n: int) -> float:
    if sd == 0.0:
        return 0.0 if mean else 1.0
    return 2.0 * float(stats.t.sf(abs(mean) / sd * math.sqrt(n), n - 1))


@lru_cache(maxsize=1024)
def detectable_dz(n: int, alpha: float = 0.05, power: float = POWER) -> float:
    """The true difference, in standard deviations, that a two-sided t test over n >= 2 seeds finds.

    t^2 follows a noncentral F. (statsmodels' TTestPower takes the noncentral t, whose tails are NaN in SciPy
    where seeds are few and differences large, and its search then stops at a wrong value: 10 instead of 34.6
    for two seeds at alpha 0.05 / 3.)
    """
    assert n >= 2, n
    threshold = float(stats.t.isf(alpha / 2.0, n - 1)) ** 2

    def missing(dz: float) -> float:
        return float(stats.ncf.sf(threshold, 1, n - 1, n * dz * dz)) - power

    high = 1.0
    while missing(high) < 0.0:
        high *= 2.0
    return float(optimize.brentq(missing, 0.0, high))  # pyright: ignore[reportArgumentType]
