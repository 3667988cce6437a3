"""Simulated studies: how often the tests of a study err, how often its intervals cover.

    python benchmarks/study_statistics.py [--out benchmarks/results/study_statistics.json]
    python benchmarks/study_statistics.py --page docs/statistics.md

Null studies: no arm differs, three planned comparisons, tested and corrected by `compare_planned` as in a
study; a rejection of any of them counts. "Independent": every comparison has a baseline of its own, so that
Holm's family-wise rate is to be 4.9 %. "Shared": three arms against one baseline; their differences are
correlated (1/2), so that it lies a little lower. Coverage: the t interval of the mean and the percentile
bootstrap of the IQM, against the mean and the IQM of the distribution drawn from. With --page nothing is
simulated: the tables of the page are written from the results file.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import integrate, stats

from aiether.study.statistics import bootstrap_iqm, compare_planned, seeds_needed, smallest_p, t_interval

RESULTS = Path(__file__).parent / "results" / "study_statistics.json"
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"
SEED = 0
ALPHA, COMPARISONS = 0.05, 3
NULL_STUDIES, NULL_SEEDS = 5_000, (5, 7, 8)
T_STUDIES, BOOTSTRAP_STUDIES, RESAMPLES = 20_000, 4_000, 2_000
COVERAGE_SEEDS = (3, 5, 8, 10, 20)
NOISE: dict[str, Any] = {"normal": stats.norm(), "heavy tails": stats.t(3), "skewed": stats.expon()}
ABOUT = {"normal": "normal", "heavy tails": "Student's t, 3 degrees of freedom", "skewed": "exponential"}


def null_rejections(noise: str, shared: bool, seeds: int, rng: np.random.Generator) -> dict[str, Any]:
    """The share of null studies in which at least one comparison is rejected."""
    shape = (NULL_STUDIES, COMPARISONS, seeds)
    arms = NOISE[noise].rvs(shape, random_state=rng)
    baselines = NOISE[noise].rvs((NULL_STUDIES, 1 if shared else COMPARISONS, seeds), random_state=rng)
    rejected = dict.fromkeys(("t", "t_holm", "sign_flip_holm"), 0)
    for study in arms - baselines:
        family = compare_planned(dict(zip("abc", study, strict=True)), ALPHA).values()
        rejected["t"] += any(below(one.t_p) for one in family)
        rejected["t_holm"] += any(below(one.t_p_holm) for one in family)
        rejected["sign_flip_holm"] += any(below(one.sign_flip_p_holm) for one in family)
    row = {"noise": noise, "design": "shared" if shared else "independent", "seeds": seeds}
    return row | {"rejected": {name: count / NULL_STUDIES for name, count in rejected.items()}}


def below(p: float | None) -> bool:
    return p is not None and p <= ALPHA


def coverage(noise: str, seeds: int, rng: np.random.Generator) -> dict[str, Any]:
    """The share of samples whose 95 % interval holds what it is an interval of."""
    distribution = NOISE[noise]
    mean, middle = float(distribution.mean()), population_iqm(distribution.ppf)
    of_mean = [holds(t_interval(x), mean) for x in distribution.rvs((T_STUDIES, seeds), random_state=rng)]
    of_iqm = [
        holds(bootstrap_iqm({"": x}, seed=number, resamples=RESAMPLES), middle)
        for number, x in enumerate(distribution.rvs((BOOTSTRAP_STUDIES, seeds), random_state=rng))
    ]
    return {"noise": noise, "seeds": seeds, "t": float(np.mean(of_mean)), "bootstrap": float(np.mean(of_iqm))}


def population_iqm(quantile: Callable[[float], float]) -> float:
    return 2.0 * integrate.quad(quantile, 0.25, 0.75)[0]


def holds(interval: tuple[float, float] | None, value: float) -> bool:
    assert interval is not None
    return interval[0] <= value <= interval[1]


def measure() -> dict[str, Any]:
    gc.freeze()  # statsmodels collects garbage at each correction
    rng = np.random.default_rng(SEED)
    null = [
        null_rejections(noise, shared, seeds, rng)
        for noise in NOISE
        for shared in (False, True)
        for seeds in NULL_SEEDS
    ]
    return {
        "alpha": ALPHA,
        "comparisons": COMPARISONS,
        "noise": ABOUT,
        "null_studies": NULL_STUDIES,
        "null": null,
        "samples": {"t": T_STUDIES, "bootstrap": BOOTSTRAP_STUDIES, "resamples": RESAMPLES},
        "coverage": [coverage(noise, seeds, rng) for noise in NOISE for seeds in COVERAGE_SEEDS],
    }


def page_with_tables(page: str, result: dict[str, Any]) -> str:
    """The page with what lies between its markers replaced by the current tables."""
    tables = {"seeds": seeds_table(), "null": null_table(result), "coverage": coverage_table(result)}
    for name, table in tables.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


def seeds_table() -> str:
    lines = [
        "| Seeds | Smallest p of the sign-flip test | Planned comparisons it can serve at 0.05 |",
        "|---|---|---|",
    ]
    for seeds in range(3, 11):
        served = max((k for k in range(1, 100) if seeds_needed(ALPHA, k) <= seeds), default=0)
        lines.append(f"| {seeds} | {smallest_p(seeds):.2g} | {served or 'none'} |")
    return "\n".join(lines)


def null_table(result: dict[str, Any]) -> str:
    lines = ["| Noise | Comparisons | Seeds | t, not corrected | t after Holm | sign-flip after Holm |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["null"]:
        figures = " | ".join(f"{share:.1%}" for share in row["rejected"].values())
        lines.append(f"| {row['noise']} | {row['design']} | {row['seeds']} | {figures} |")
    return "\n".join(lines)


def coverage_table(result: dict[str, Any]) -> str:
    lines = [
        "| Noise | Seeds | t interval of the mean | bootstrap interval of the IQM |",
        "|---|---|---|---|",
    ]
    for row in result["coverage"]:
        lines.append(f"| {row['noise']} | {row['seeds']} | {row['t']:.1%} | {row['bootstrap']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    from _machine import about  # only beside this file; the page's tables are also made from elsewhere

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="write this page's tables from --out and simulate nothing")
    arguments = parser.parse_args()
    if arguments.page is None:
        where = about(seeds=[SEED], more_versions=["numpy", "scipy", "statsmodels"])
        result = {**measure(), **where}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"{null_table(result)}\n\n{coverage_table(result)}")
    else:
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(page_with_tables(page, result), encoding="utf-8")


if __name__ == "__main__":
    main()
