"""The family of planned comparisons: each tested, all corrected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from statsmodels.stats.multitest import multipletests

from aiether.study.statistics.paired import Paired, paired
from aiether.study.statistics.values import Values, check_share
from aiether.study.statistics.verdict import TESTS, Test, rejects, verdict


@dataclass(frozen=True)
class Comparison(Paired):
    """A comparison of a family; `detectable` is taken at Holm's first step, alpha / size of the family."""

    t_p_holm: float | None
    sign_flip_p_holm: float | None
    distinguishable: bool  # by the declared test, after Holm
    verdict: str


def compare_planned(
    differences_by_name: Mapping[str, Values],
    alpha: float = 0.05,
    *,
    test: Test = "t",
    higher_is_better: bool = False,
) -> dict[str, Comparison]:
    """Every comparison of the family that was declared before the study ran, in the order given.

    Args:
        differences_by_name: for each comparison one difference a seed, shape (n,); n may differ and may be 0.
        alpha: the probability of any false rejection in the whole family.
        test: decides the verdict; both tests are reported.
        higher_is_better: of the metric, for the verdict's words.

    A comparison that has fewer than two seeds stays in the family: it was planned, so it costs the others.
    Raises ValueError for NaN, infinity, an unknown test or an alpha outside (0, 1).
    """
    check_test(test)
    check_share(alpha, "alpha")
    size = max(1, len(differences_by_name))
    results = {name: paired(each, alpha=alpha / size) for name, each in differences_by_name.items()}
    corrected = correct(list(results.values()))
    compared = {}
    for (name, result), (t_p, sign_flip) in zip(results.items(), corrected, strict=True):
        p = t_p if test == "t" else sign_flip
        words = verdict(
            result, p, alpha=alpha, comparisons=size, test=test, higher_is_better=higher_is_better
        )
        compared[name] = Comparison(
            **asdict(result),
            t_p_holm=t_p,
            sign_flip_p_holm=sign_flip,
            distinguishable=rejects(p, alpha),
            verdict=words,
        )
    return compared


def check_test(test: str) -> None:
    if test not in TESTS:
        raise ValueError(f"test {test!r}; the tests are {', '.join(TESTS)}")


def correct(results: Sequence[Paired]) -> list[tuple[float | None, float | None]]:
    """Each comparison's p of the t test and of the sign-flip test after Holm; None below two seeds."""
    t_ps = holm([result.t_p for result in results])
    sign_flips = holm([result.sign_flip_p if result.n > 1 else None for result in results])
    return list(zip(t_ps, sign_flips, strict=True))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values in the order given; a None counts in the family as 1 and stays None."""
    if not ps:
        return []
    adjusted = np.asarray(multipletests([1.0 if p is None else p for p in ps], method="holm")[1])
    return [None if p is None else float(value) for p, value in zip(ps, adjusted, strict=True)]
