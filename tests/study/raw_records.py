"""The raw records of a study's runs, and statistics with NumPy and SciPy: nothing of the product."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy import stats

Table = list[dict[str, str]]
COSTS = {"tokens": "tokens", "FLOPs": "flops", "training time": "elapsed_s"}
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻−", "0123456789--")
SCALE = {"%": 0.01, "×": 1.0, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}


class Run:
    """One run, from its raw records."""

    def __init__(self, folder: Path, judged: str) -> None:
        self.condition = folder.parent.name
        length, _, rest = folder.name.partition("-")
        self.length, self.seed = float(length), int(rest.rpartition("seed")[2])
        self.lr = yaml.safe_load((folder / "config.yaml").read_text())["lr"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.evals = [row for row in rows if row["kind"] == "eval"]
        best = min(self.evals, key=lambda row: row["eval_loss"])
        self.last, self.rows = best if judged == "best" else self.evals[-1], rows
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        self.growths = [event for event in events if event["event"] == "growth"]


class Study:
    """All runs of a study, and its tables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = yaml.safe_load((folder / "study.yaml").read_text())
        judged = self.spec.get("judged", "last")
        runs = [Run(path.parent, judged) for path in sorted(folder.glob("cells/*/*/result.json"))]
        self.runs = [run for run in runs if run.seed in self.spec["seeds"]]
        self.tuning = [run for run in runs if run.seed not in self.spec["seeds"]]
        self.page = (folder / "tables.md").read_text()
        self.tables = tables(self.page)
        self.html = (folder / "report.html").read_text()
        self.results = json.loads((folder / "results.json").read_text())
        self.checked = 0

    def of(self, condition: str, length: float = 1.0) -> dict[int, Run]:
        found = (run for run in self.runs if (run.condition, run.length) == (condition, length))
        return {run.seed: run for run in found}

    def losses(self, condition: str, length: float = 1.0) -> np.ndarray:
        return np.array([run.last["eval_loss"] for run in self.of(condition, length).values()])

    def gaps(self, arm: str, against: str) -> np.ndarray:
        """Differences of loss, seed by seed."""
        ours, theirs = self.of(arm), self.of(against)
        return np.array(
            [ours[s].last["eval_loss"] - theirs[s].last["eval_loss"] for s in ours if s in theirs]
        )

    def same(self, cell: str, *expected: float) -> None:
        """The numbers of a cell are these, to the digits that are printed."""
        found = numbers(cell)
        assert len(found) == len(expected), (cell, expected)
        for (value, unit_in_last_place), wanted in zip(found, expected, strict=True):
            if "<" in cell:  # of a p value too small to be printed
                assert wanted < value, (cell, expected)
                continue
            assert abs(value - wanted) <= 0.5000001 * unit_in_last_place, (cell, expected)
        self.checked += len(expected)


def tables(text: str) -> dict[str, Table]:
    """Title to rows of a Markdown page."""
    found: dict[str, Table] = {}
    title, lines = "", list[str]()
    for line in [*text.replace("\\_", "_").splitlines(), "# end"]:
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            cells = [[cell.strip() for cell in each.strip("|").split("|")] for each in lines]
            names = [
                f"{name} (2)" if name in cells[0][:place] else name for place, name in enumerate(cells[0])
            ]
            found[title] = [dict(zip(names, row, strict=True)) for row in cells[2:]]
            lines = []
        if line.startswith("#"):
            title = re.sub(r"^#+ ", "", line)
    return found


def numbers(cell: str) -> list[tuple[float, float]]:
    """The numbers of a cell, each with the size of a unit in its last place."""
    text = cell.translate(DIGITS).replace(",", "")
    if re.fullmatch(r"(\d+ h )?(\d+ min )?(\d+ s)?", text) and text:
        return [_time(text)]
    found = []
    for match in re.finditer(r"([-+]?\d+(?:\.(\d+))?)(?:×10(-?\d+))?\s?([%×MBT]?)", text):
        scale = SCALE[match[4]] * (10.0 ** int(match[3]) if match[3] else 1.0)
        digits = len(match[2] or "")
        whole_digits = len(match[1].lstrip("+-")) if not digits else 0
        rounded = 10 ** max(0, whole_digits - 3) if match[4] in "MBT" and match[4] else 1
        found.append((float(match[1]) * scale, scale * rounded * 10.0**-digits))
    return found


def _time(text: str) -> tuple[float, float]:
    parts = {unit: int(value) for value, unit in re.findall(r"(\d+) (h|min|s)", text)}
    unit = 60.0 if "h" in parts else 1.0
    return parts.get("h", 0) * 3600.0 + parts.get("min", 0) * 60.0 + parts.get("s", 0), unit


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    if np.ptp(values) == 0:  # scipy's interval of nothing is NaN
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(low), float(high)


def t_test(gaps: np.ndarray) -> float:
    tested: Any = stats.ttest_1samp(gaps, 0.0)
    if not gaps.any():  # nothing speaks against there being no difference
        return 1.0
    return float(tested.pvalue)


def sign_flip(gaps: np.ndarray) -> float:
    """The share of all 2^n choices of signs whose sum is as large."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(gaps))))
    return float(np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()) * (1 - 1e-12)))


def holm(ps: Sequence[float]) -> list[float]:
    order, highest, found = np.argsort(ps), 0.0, dict[int, float]()
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        found[int(index)] = highest
    return [found[index] for index in range(len(ps))]


def detectable(gaps: np.ndarray, alpha: float) -> float:
    """The true difference that a t test finds with power 0.8, by bisection on the noncentral F."""
    n, critical = len(gaps), stats.f.isf(alpha, 1, len(gaps) - 1)
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        power = stats.ncf.sf(critical, 1, n - 1, n * middle**2)
        low, high = (low, middle) if power >= 0.8 else (middle, high)
    return high * float(gaps.std(ddof=1))


def curve(study: Study, baseline: str, seed: int, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the cost, and loss, of a baseline's runs of one seed; cheapest first."""
    runs = [run for run in study.runs if (run.condition, run.seed) == (baseline, seed)]
    points = sorted((math.log(run.last[COSTS[cost]]), run.last["eval_loss"]) for run in runs)
    assert len(points) > 2, "a curve of fewer than three lengths is not checked here"
    losses = np.array([point[1] for point in points])
    assert (np.diff(losses) < 0).all(), "a curve that does not fall is not checked here"
    return np.array([point[0] for point in points]), losses


class Saved(NamedTuple):
    """What a run spent, and its baseline would have on the same loss. `beyond`: better than the longest."""

    spent: float
    would: float
    beyond: bool = False

    @property
    def share(self) -> float:
        return 1.0 - self.spent / self.would


def at_equal_loss(study: Study, arm: str, baseline: str, cost: str) -> dict[int, Saved | None]:
    """By seed; None above the baseline's shortest run, its longest run for one that is better than that."""
    found: dict[int, Saved | None] = {}
    for seed, run in study.of(arm).items():
        costs, losses = curve(study, baseline, seed, cost)
        loss, spent = run.last["eval_loss"], run.last[COSTS[cost]]
        found[seed] = None
        if loss < losses.min():
            found[seed] = Saved(spent, math.exp(costs[-1]), beyond=True)
        elif loss <= losses.max():
            found[seed] = Saved(spent, math.exp(np.interp(-loss, -losses, costs)))
    return found


def at_equal_cost(study: Study, arm: str, baseline: str, cost: str) -> dict[int, float | None]:
    """By seed: the arm's loss minus its baseline's at the same cost; None outside of the baseline's curve."""
    found: dict[int, float | None] = {}
    for seed, run in study.of(arm).items():
        costs, losses = curve(study, baseline, seed, cost)
        spent = math.log(run.last[COSTS[cost]])
        inside = costs.min() <= spent <= costs.max()
        found[seed] = run.last["eval_loss"] - float(np.interp(spent, costs, losses)) if inside else None
    return found


def effect(study: Study, named: str) -> np.ndarray:
    """A factor's, or of several an interaction's, in each seed: losses with their signs, over 2^(k - 1)."""
    factors = {name: list(levels) for name, levels in study.spec["factors"].items()}
    found: dict[int, float] = {}
    for levels in itertools.product(*factors.values()):
        high = {name: level == factors[name][1] for name, level in zip(factors, levels, strict=True)}
        sign = math.prod(1 if high[name] else -1 for name in named.split(" x "))
        arm = "+".join(f"{name}.{level}" for name, level in zip(factors, levels, strict=True))
        for seed, run in study.of(arm, 1.0).items():
            found[seed] = found.get(seed, 0.0) + sign * run.last["eval_loss"] / 2 ** (len(factors) - 1)
    return np.array(list(found.values()))
