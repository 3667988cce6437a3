"""What growing saved: every grown run of a screening against the tuned static curve of its optimizer.

    python benchmarks/recipe_savings.py benchmarks/results/recipe/*.jsonl [--only STEM] [--page PAGE.md]

The static curve of one seed goes, at each length, through the best loss over the learning rates tried. "Same
loss" is read off that curve between the two lengths around it, straight in (log budget, loss); a loss outside
the lengths that were run gets no figure. A saving is 1 - grown budget / static budget, for head-inclusive
FLOPs and for seconds; for seconds the speed of the static runs in the same results file counts, which one
machine wrote. Prints Markdown, or writes it between the markers of a page: static runs and grown ones, or
with --only the grown runs of one results file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- screenings: begin -->", "<!-- screenings: end -->"


@dataclass(frozen=True)
class End:
    """One run measured at its end."""

    name: str
    recipe: str  # all its settings but the seed
    group: tuple[str, int, int]  # optimizer, width, seed
    source: str  # the results file
    static: bool
    depth: int  # at the end; only runs of one final depth are compared
    steps: int
    loss: float
    flops: float
    seconds: float


def read_ends(paths: Iterable[Path]) -> list[End]:
    ends = []
    lines = [(path.stem, line) for path in paths for line in path.read_text().splitlines()]
    for source, line in lines:
        result: dict[str, Any] = json.loads(line)
        arm = result["arm"]
        group = (arm["optimizer"], arm["n_embd"], arm["seed"])
        for row in (row for row in result["rows"] if row["kind"] == "end"):
            ends.append(
                End(
                    arm["name"],
                    _recipe(arm),
                    group,
                    source,
                    not arm["growth"],
                    row["depth"],
                    row["end"],
                    row["loss"],
                    row["flops"],
                    row["seconds"],
                )
            )
    return ends


def _recipe(arm: dict[str, Any]) -> str:
    """What makes two arms the same but for the seed: neither its name nor how kernels are launched."""
    return json.dumps(
        {k: v for k, v in arm.items() if k not in ("name", "seed", "cuda_graphs")}, sort_keys=True
    )


def static_curve(ends: Iterable[End]) -> list[End]:
    """The best static run of each length, shortest first."""
    best: dict[int, End] = {}
    for end in ends:
        if end.static and (end.steps not in best or end.loss < best[end.steps].loss):
            best[end.steps] = end
    return [best[steps] for steps in sorted(best)]


def flops_at(curve: Sequence[End], loss: float) -> float | None:
    """The static FLOPs that reach `loss`; None outside the curve."""
    for shorter, longer in itertools.pairwise(curve):
        if longer.loss <= loss <= shorter.loss:
            low, high = math.log(shorter.flops), math.log(longer.flops)
            share = (shorter.loss - loss) / (shorter.loss - longer.loss)
            return math.exp(low + share * (high - low))
    return None


def seconds_per_flop(ends: Iterable[End], source: str) -> float | None:
    """The speed of static training on the machine of one file: whatever the learning rate, the same."""
    rates = [end.seconds / end.flops for end in ends if end.static and end.source == source]
    return statistics.median(rates) if rates else None


def savings(ends: Sequence[End]) -> list[dict[str, Any]]:
    rows = []
    for group in sorted({end.group for end in ends}):
        members = [end for end in ends if end.group == group]
        for end in (end for end in members if not end.static):
            curve = static_curve(member for member in members if member.depth == end.depth)
            static, rate = flops_at(curve, end.loss), seconds_per_flop(members, end.source)
            saved = {"flops": None if static is None else 1 - end.flops / static, "seconds": None}
            if static is not None and rate is not None:
                saved["seconds"] = 1 - end.seconds / (static * rate)
            rows.append({**asdict(end), "saved": saved})
    return rows


def over_seeds(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same recipe over its seeds: the mean and every seed's figure."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[(row["recipe"], row["steps"], *row["group"][:2])].append(row)
    merged = []
    for (_, steps, optimizer, width), entries in grouped.items():
        name = entries[0]["name"]
        depths = ", ".join(str(depth) for depth in sorted({entry["depth"] for entry in entries}))
        merged.append({"name": f"{name} ({depths} layers at the end)" if depths != "12" else name})
        merged[-1] |= {"steps": steps, "optimizer": optimizer, "width": width}
        merged[-1]["losses"] = [entry["loss"] for entry in entries]
        spent = [entry["flops"] for entry in entries]
        merged[-1]["flops"] = spent if len(set(spent)) > 1 else spent[:1]  # those of a trigger differ by seed
        merged[-1]["seconds"] = statistics.fmean(entry["seconds"] for entry in entries)
        for budget in ("flops", "seconds"):
            known = [e["saved"][budget] for e in entries if e["saved"][budget] is not None]
            merged[-1][f"{budget}_saved"] = known
    return merged


def static_table(ends: Sequence[End]) -> str:
    lines = ["| static run | seed | steps | loss | FLOPs (1e16) | s |", "|---|---|---|---|---|---|"]
    for end in sorted((e for e in ends if e.static), key=lambda e: (e.group, e.name, e.steps)):
        lines.append(
            f"| {end.name} | {end.group[2]} | {end.steps} | {end.loss:.3f} | {end.flops / 1e16:.3f} | "
            f"{end.seconds:.0f} |"
        )
    return "\n".join(lines)


def grown_table(merged: Iterable[dict[str, Any]]) -> str:
    lines = ["| grown run | steps | loss by seed | FLOPs (1e16) | FLOPs saved | time saved |"]
    lines.append("|---|---|---|---|---|---|")
    for row in sorted(merged, key=lambda r: (r["width"], r["optimizer"], statistics.fmean(r["losses"]))):
        losses = " / ".join(f"{loss:.3f}" for loss in row["losses"])
        budget = " / ".join(f"{flops / 1e16:.3f}" for flops in row["flops"])
        cells = [row["name"], str(row["steps"]), losses, budget]
        cells += [_percent(row[f"{budget}_saved"]) for budget in ("flops", "seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    each = f" ({', '.join(f'{v:.0%}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.0%}{each}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only", help="stem of the results file whose grown runs are shown")
    arguments = parser.parse_args()
    ends = read_ends(arguments.results)
    saved = savings(ends)
    if arguments.only:
        text = grown_table(over_seeds(row for row in saved if row["source"] == arguments.only))
    else:
        text = f"{static_table(ends)}\n\n{grown_table(over_seeds(saved))}"
    if arguments.page is None:
        print(text)
    else:
        before, _, rest = arguments.page.read_text().partition(BEGIN)
        arguments.page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
