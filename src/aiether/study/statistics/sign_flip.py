"""The exact sign-flip test, and what a number of seeds can show with it.

Under no difference the two arms of a seed could have been swapped, which turns the sign of its difference.
All 2^n patterns of signs are then equally likely.
"""

from __future__ import annotations

import math

import numpy as np

from aiether.study.statistics.values import Values, as_values, check_share

MAX_EXACT = 16  # 65,536 patterns
NUM_DRAWS = 100_000
SEED = 0
# Sums of the same numbers in another order differ in their last bits; such patterns tie with the observed.
TIE = 1e-12


def sign_flip_p(differences: Values) -> float:
    """Two-sided p: the share of sign patterns with a |mean| of at least the observed one; 1 without seeds.

    Exact up to 16 differences. Above that 100,000 drawn patterns with a fixed seed, and
    (1 + hits) / (1 + draws), which is never 0. The order of the differences does not matter.
    """
    size = np.sort(np.abs(as_values(differences, "differences")))
    if size.size == 0:
        return 1.0
    least = abs(float(np.sum(differences))) - TIE * float(size.sum())
    if size.size > MAX_EXACT:
        hits = int(np.count_nonzero(np.abs(_drawn_sums(size)) >= least))
        return (1 + hits) / (1 + NUM_DRAWS)
    return float(np.mean(np.abs(_all_sums(size)) >= least))


def _all_sums(size: np.ndarray) -> np.ndarray:
    """Of the patterns with a plus at the first place, shape (2^(n-1),): the others mirror them."""
    sums = size[:1]
    for value in size[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _drawn_sums(size: np.ndarray) -> np.ndarray:
    signs = np.random.default_rng(SEED).integers(0, 2, (NUM_DRAWS, size.size), dtype=np.int8)
    return (2.0 * signs - 1.0) @ size


def smallest_p(n: int) -> float:
    """The smallest two-sided p that a sign-flip test over n seeds can give: 2 / 2^n, and 1 without seeds."""
    if n < 0:
        raise ValueError(f"{n} seeds; there cannot be fewer than 0")
    return min(1.0, 2.0 ** (1 - n))


def seeds_needed(alpha: float = 0.05, comparisons: int = 1) -> int:
    """The fewest seeds whose sign-flip test can reach Holm's first step, alpha / comparisons."""
    check_share(alpha, "alpha")
    if comparisons < 1:
        raise ValueError(f"{comparisons} comparisons; there must be at least 1")
    n = max(1, math.floor(1.0 - math.log2(alpha / comparisons)))
    while smallest_p(n) > alpha / comparisons:
        n += 1
    return n
