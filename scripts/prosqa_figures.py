"""The tables of docs/prosqa.md, from benchmarks/results/prosqa.json."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

ARMS = {
    "none": "no thought",
    "pause": "{pauses} pause tokens",
    "latent": "{iterations} latent iterations",
    "sampled": "the same, sampled exits, all taken",
    "deeper": "{iterations} more layers",
    "steps": "steps written out",
}
GIVEN = ("prosqa_valid", "prosqa_test")
FURTHER = {
    "7 hops": ("far_7hop",),
    "8 hops": ("far_8hop",),
    "repaired": ("ood_7hop_repaired", "ood_8hop_repaired", "ood_dag_repaired", "ood_dense_repaired"),
}


def share(run: dict[str, Any], names: Sequence[str], figure: str, hops: int | None = None) -> float | None:
    """A mean over the questions of some sets, of one number of hops if it is given; None: there are none."""
    total, count = 0.0, 0
    for name in names:
        found = run["sets"].get(name)
        found = found if hops is None or found is None else found["by_hops"].get(str(hops))
        if found is not None:
            total, count = total + found[figure] * found["problems"], count + found["problems"]
    return total / count if count else None


def accuracy(result: dict[str, Any]) -> str:
    """A row an arm: parameters, choice on the given sets by hops, on further ones, exact match."""
    columns: list[tuple[str, Sequence[str], str, int | None]] = [("all", GIVEN, "choice", None)]
    columns += [(f"{hops} hops", GIVEN, "choice", hops) for hops in (3, 4, 5, 6)]
    columns += [("exact", GIVEN, "exact", None)]
    columns += [(label, names, "choice", None) for label, names in FURTHER.items()]
    lines = [
        f"| arm | parameters | {' | '.join(label for label, *_ in columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for arm, name in ARMS.items():
        runs = [run for run in result["runs"] if run["arm"] == arm]
        if runs:
            cells = [
                _over_seeds([share(run, names, figure, hops) for run in runs])
                for _, names, figure, hops in columns
            ]
            size = f"{runs[0]['parameters'] / 1e6:.1f} M"
            lines.append(f"| {name.format(**result['shape'])} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_seeds(shares: Sequence[float | None]) -> str:
    known = [100 * each for each in shares if each is not None]
    if not known:
        return ""
    return f"{fmean(known):.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")


def halting(result: dict[str, Any]) -> str:
    """Accuracy and iterations by hops at each threshold; empty where nothing halts."""
    lines = [
        "| halting | choice | iterations | 3 hops | 4 | 5 | 6 | in the question |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, key, name in (
        ("latent", "second_stage", "second stage"),
        ("sampled", "halted", "sampled exits"),
    ):
        runs = [run for run in result["runs"] if run["arm"] == arm]
        for q in runs[0][key]["at"] if runs else ():
            at = [{"sets": run[key]["at"][q]} for run in runs]
            choice = _over_seeds([share(each, GIVEN, "choice") for each in at])
            taken = [
                _mean([share(each, GIVEN, "iterations", hops) for each in at]) for hops in (None, 3, 4, 5, 6)
            ]
            asked = _mean([share(each, GIVEN, "question_iterations") for each in at])
            lines.append(f"| {name}, q={q} | {choice} | {' | '.join(taken)} | {asked} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _mean(figures: Sequence[float | None]) -> str:
    known = [each for each in figures if each is not None]
    return f"{fmean(known):.2f}" if known else ""


def tables(result: dict[str, Any]) -> str:
    """All of it, with where it was measured."""
    shape, machine = result["shape"], result["gpu"] or result["machine"]["cpu"]
    about = (
        f"{shape['layers']} layers of width {shape['width']}, {shape['steps']:,} steps of {shape['batch']} "
        f"rows, {len(result['seeds'])} seeds, {machine}. Choice between the two concepts in %, mean of the "
        "seeds ± their standard deviation (chance: 50):"
    )
    return "\n\n".join(part for part in (about, accuracy(result), halting(result)) if part)
