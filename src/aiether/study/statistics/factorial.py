"""Two-level factorial designs: main effects and interactions as contrasts within each seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from aiether.study.statistics.paired import paired
from aiether.study.statistics.planned import Comparison, check_test, correct
from aiether.study.statistics.values import check_share
from aiether.study.statistics.verdict import Test, rejects, verdict

Level = Any
Seed = Any
# By cell (one level of each factor, in the order of the factors) and by seed.
Outcomes = Mapping[Any, Mapping[Any, float]]
TIMES = " x "


@dataclass(frozen=True)
class Effect(Comparison):
    """A main effect ("mod") or an interaction ("mod x latent"), positive where the high level has more.

    Outside the declared family nothing is corrected: the p values after Holm are None, `distinguishable` is
    False, `detectable` is taken at alpha, and the verdict begins with "exploratory".
    """

    effect: str
    factors: tuple[str, ...]
    seeds: tuple[Seed, ...]  # those that have every cell
    left_out: tuple[Seed, ...]  # those that lack one
    differences: tuple[float, ...]  # the contrast of each of `seeds`


def factorial(
    values: Outcomes,
    factors: Sequence[str],
    *,
    alpha: float = 0.05,
    family: Literal["all", "main"] | Collection[str] = "all",
    levels: Mapping[str, tuple[Level, Level]] | None = None,
    test: Test = "t",
    higher_is_better: bool = False,
) -> tuple[Effect, ...]:
    """All 2^k - 1 effects of a full design of k factors, main effects first.

    In each seed the effect of a set of factors is the sum over cells of y times the product of their signs,
    divided by 2^(k-1): mean(high) - mean(low) for a main effect, and half the difference between the effects
    of one factor at the levels of the other for an interaction of two (Box, Hunter & Hunter, 2005, chapter
    5). These contrasts, one a seed, are tested against 0 as paired differences are.

    Args:
        values: for each cell the metric of each seed; a seed that lacks a cell is left out of every effect.
        factors: names, in the order of the levels in a cell.
        family: what Holm corrects over: "all" effects, the "main" ones, or the names of effects.
        levels: (low, high) of each factor; the first to appear in `values` is the low one where not given.

    Raises ValueError for a factor with another number of levels than two (compare such arms as planned
    comparisons), a design that lacks a cell, an unknown effect in `family`, NaN or infinity.
    """
    check_share(alpha, "alpha")
    check_test(test)
    low_high = _levels(values, factors, levels or {})
    seeds, left_out = _complete(values)
    subsets = [s for size in range(1, len(factors) + 1) for s in itertools.combinations(factors, size)]
    members = _family(subsets, family)
    contrasts = {s: [_contrast(values, seed, factors, s, low_high) for seed in seeds] for s in subsets}
    results = {
        s: paired(c, alpha=alpha / len(members) if s in members else alpha) for s, c in contrasts.items()
    }
    corrected = dict(zip(members, correct([results[subset] for subset in members]), strict=True))

    def effect(subset: tuple[str, ...]) -> Effect:
        t_p, sign_flip = corrected.get(subset, (results[subset].t_p, results[subset].sign_flip_p))
        p, member = t_p if test == "t" else sign_flip, subset in members
        words = verdict(
            results[subset],
            p,
            alpha=alpha,
            comparisons=len(members) if member else 1,
            test=test,
            higher_is_better=higher_is_better,
            interaction=len(subset) > 1,
        )
        return Effect(
            **asdict(results[subset]),
            t_p_holm=t_p if member else None,
            sign_flip_p_holm=sign_flip if member else None,
            distinguishable=member and rejects(p, alpha),
            verdict=words if member else f"exploratory: {words}",
            effect=TIMES.join(subset),
            factors=subset,
            seeds=seeds,
            left_out=left_out,
            differences=tuple(contrasts[subset]),
        )

    return tuple(effect(subset) for subset in subsets)


def _levels(
    values: Outcomes, factors: Sequence[str], given: Mapping[str, tuple[Level, Level]]
) -> list[tuple[Level, Level]]:
    """(low, high) of each factor, after the design was found to be whole."""
    if not factors or len(set(factors)) < len(factors):
        raise ValueError(f"factors {list(factors)}; give at least one, each once")
    wrong = [cell for cell in values if len(cell) != len(factors)]
    if wrong:
        raise ValueError(f"cell {wrong[0]} has {len(wrong[0])} levels for {len(factors)} factors")
    pairs = []
    for place, factor in enumerate(factors):
        found = list(dict.fromkeys(cell[place] for cell in values))
        if len(found) != 2:
            raise ValueError(
                f"factor {factor!r} has the levels {', '.join(map(str, found))}; a factorial takes two: "
                "declare the others as planned comparisons"
            )
        pair = given.get(factor, (found[0], found[1]))
        if set(pair) != set(found):
            raise ValueError(f"levels {pair} of factor {factor!r}; the values have {tuple(found)}")
        pairs.append(pair)
    missing = [cell for cell in itertools.product(*pairs) if cell not in values]
    if missing:
        raise ValueError(f"no values for {missing[0]}, one of {2 ** len(factors)} cells; run it too")
    return pairs


def _complete(values: Outcomes) -> tuple[tuple[Seed, ...], tuple[Seed, ...]]:
    """The seeds that have every cell, and the others, in the order in which they appear."""
    every = dict.fromkeys(seed for each in values.values() for seed in each)
    whole = tuple(seed for seed in every if all(seed in each for each in values.values()))
    return whole, tuple(seed for seed in every if seed not in whole)


def _family(subsets: Sequence[tuple[str, ...]], family: str | Collection[str]) -> list[tuple[str, ...]]:
    if family == "all":
        return list(subsets)
    if family == "main":
        return [subset for subset in subsets if len(subset) == 1]
    by_name = {TIMES.join(subset): subset for subset in subsets}
    chosen = {family} if isinstance(family, str) else set(family)
    if not chosen or chosen - by_name.keys():
        raise ValueError(f"family {sorted(chosen)}; the effects are {', '.join(by_name)}")
    return [subset for name, subset in by_name.items() if name in chosen]


def _contrast(
    values: Outcomes,
    seed: Seed,
    factors: Sequence[str],
    subset: tuple[str, ...],
    low_high: Sequence[tuple[Level, Level]],
) -> float:
    places = [place for place, factor in enumerate(factors) if factor in subset]
    terms = [
        each[seed] * math.prod(1 if cell[place] == low_high[place][1] else -1 for place in places)
        for cell, each in values.items()
    ]
    return math.fsum(terms) / 2 ** (len(factors) - 1)
