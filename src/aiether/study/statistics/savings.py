"""What was saved at equal loss: one share a seed, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence

from aiether.study.statistics.interval import MeanInterval, mean_interval


def savings_verdict(savings: Sequence[float | None], what: str) -> str:
    """For example "24 ± 5 % fewer FLOPs over 4 seeds; 1 seed outside the baseline's curve".

    Args:
        savings: for each seed 1 - cost of the arm / cost of the baseline at the same loss; None where the
            loss lies outside the lengths that the baseline ran.
        what: the cost, as it stands after "fewer": "FLOPs", "tokens", "seconds".

    ± is half of the 95 % t interval over the known seeds; an interval that holds 0 shows no saving. There
    is no correction for several comparisons: these figures say how much, the planned comparisons say whether.
    """
    result = mean_interval(savings)
    return _known(result, what) + _missing(result)


def _known(result: MeanInterval, what: str) -> str:
    if result.mean is None:
        return "no saving known"
    if result.ci95 is None:
        return f"{_share(result.mean, what)} in one seed: no interval"
    low, high = result.ci95
    half = 50.0 * (high - low)
    if low <= 0.0 <= high:
        return f"no saving shown: {100.0 * result.mean:.0f} ± {half:.0f} % over {result.n} seeds"
    more = "fewer" if result.mean > 0.0 else "more"
    return f"{abs(100.0 * result.mean):.0f} ± {half:.0f} % {more} {what} over {result.n} seeds"


def _share(share: float, what: str) -> str:
    return f"{abs(share):.0%} {'fewer' if share >= 0.0 else 'more'} {what}"


def _missing(result: MeanInterval) -> str:
    if not result.missing:
        return ""
    return f"; {result.missing} seed{'s' if result.missing > 1 else ''} outside the baseline's curve"
