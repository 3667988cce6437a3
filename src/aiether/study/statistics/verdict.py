"""What a comparison says, in one plain sentence."""

from __future__ import annotations

import math
from typing import Literal

from aiether.study.statistics.paired import Paired
from aiether.study.statistics.sign_flip import seeds_needed

Test = Literal["t", "sign_flip"]
TESTS: tuple[Test, ...] = ("t", "sign_flip")


def verdict(
    result: Paired,
    p: float | None,
    *,
    alpha: float = 0.05,
    comparisons: int = 1,
    test: Test = "t",
    higher_is_better: bool = False,
    interaction: bool = False,
) -> str:
    """For example "lower by 0.031 ± 0.008 over 5 seeds; p = 0.002 after Holm".

    Args:
        result: the comparison. What follows ± is half of its 95 % interval.
        p: of `test`, after Holm where there are several comparisons; None where there is no test.
        alpha: p <= alpha is a difference; else "not distinguishable".
        comparisons: size of the family that p was corrected over; 1 for no correction.
        higher_is_better: said beside the direction, since a loss is what one expects.
        interaction: the mean is an interaction contrast, which is not "lower" or "higher".
    """
    if result.n < 2:
        return "one seed: no test" if result.n == 1 else "no seeds: no test"
    assert p is not None
    assert result.detectable is not None
    if result.sd == 0.0 and result.mean == 0.0:
        return f"no difference in any of {result.n} seeds"
    if p <= alpha:
        what = _size(result, higher_is_better, interaction)
        return f"{what} over {result.n} seeds; {_p(p)}{' after Holm' if comparisons > 1 else ''}"
    if test == "sign_flip" and result.smallest_p > alpha / comparisons:
        needed = seeds_needed(alpha, comparisons)
        return (
            f"not distinguishable: {result.n} seeds cannot reach p = {alpha / comparisons:.2g} in a sign-flip"
            f" test, {needed} can"
        )
    return f"not distinguishable: {result.n} seeds could have shown {figure(result.detectable)}"


def rejects(p: float | None, alpha: float) -> bool:
    return p is not None and p <= alpha


def _size(result: Paired, higher_is_better: bool, interaction: bool) -> str:
    assert result.mean is not None
    assert result.ci95 is not None
    half = (result.ci95[1] - result.ci95[0]) / 2.0
    if interaction:
        return f"interaction of {with_error(result.mean, half)}"
    lower = result.mean < 0.0
    judged = f" ({'worse' if lower else 'better'})" if higher_is_better else ""
    return f"{'lower' if lower else 'higher'}{judged} by {with_error(abs(result.mean), half)}"


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def figure(value: float) -> str:
    """One significant digit, two after a leading 1: 0.02, 0.014, 300."""
    return _rounded(value, _decimals(value))


def with_error(value: float, error: float) -> str:
    """The error as `figure` has it, the value to the same place, a few digits at most: "0.031 ± 0.008"."""
    decimals = min(_decimals(error), _decimals(value) + 3) if error > 0.0 else _decimals(value) + 1
    return f"{_rounded(value, decimals)} ± {_rounded(error, decimals)}"


def _decimals(value: float) -> int:
    if value == 0.0:
        return 0
    mantissa, exponent = f"{abs(value):.1e}".split("e")
    return (1 if mantissa.startswith("1.") else 0) - int(exponent)


def _rounded(value: float, decimals: int) -> str:
    if abs(value) >= 1e6:
        digits = max(0, math.floor(math.log10(abs(value))) + decimals)
        return f"{value:.{digits}e}"
    return f"{round(value, decimals):,.{max(0, decimals)}f}"
