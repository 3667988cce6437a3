"""Accuracies of ProsQA runs in plain lines, with 95 % intervals over questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was found in `count` trials."""
    z = 1.96
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def pooled(runs: Sequence[dict[str, Any]], figure: str, names: Sequence[str], hops: int | None = None) -> Any:
    """A figure over sets and seeds: (mean, problems of one seed); None where there is no such problem."""
    total, count = 0.0, 0
    for each in runs:
        for name in names:
            rows = each["sets"][name]
            rows = rows if hops is None else rows["by_hops"].get(str(hops), rows["by_hops"].get(hops))
            if rows is not None:
                total, count = total + rows[figure] * rows["problems"], count + rows["problems"]
    return (total / count, count // len(runs)) if count else None


def show(result: dict[str, Any], arms: Sequence[str]) -> None:
    """Accuracy on the given validation and test questions, of each arm, by hops."""
    for arm in arms:
        runs = [each for each in result["runs"] if each["arm"] == arm]
        if not runs:
            continue
        parts = []
        for hops in (None, 3, 4, 5, 6):
            found = pooled(runs, "choice", ("prosqa_valid", "prosqa_test"), hops)
            if found:
                low, high = wilson(*found)
                parts.append(f"{'all' if hops is None else hops} {found[0]:.3f} ({low:.3f} to {high:.3f})")
        print(f"{arm:8s} {len(runs)} seeds, choice by hops: {'; '.join(parts)}", flush=True)
