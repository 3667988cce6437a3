"""The numbers of a study's report, computed once more from the raw records of its runs.

    python -m tests.study.recompute STUDY_DIR

Nothing of the product is used: metrics.jsonl, events.jsonl and config.yaml of every run are read here, and
the statistics are written out with NumPy and SciPy. Every number of the tables (tables.md; the page shows the
same) must be the one found here, to the digits that are printed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

Table = list[dict[str, str]]
COSTS = {"tokens": "tokens", "FLOPs": "flops", "training time": "elapsed_s"}
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻−", "0123456789--")
SCALE = {"%": 0.01, "×": 1.0, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}


class Run:
    """One run, from its raw records."""

    def __init__(self, folder: Path) -> None:
        self.condition = folder.parent.name
        length, _, rest = folder.name.partition("-")
        self.length, self.seed = float(length), int(rest.rpartition("seed")[2])
        self.lr = yaml.safe_load((folder / "config.yaml").read_text())["lr"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.evals = [row for row in rows if row["kind"] == "eval"]
        self.last, self.rows = self.evals[-1], rows
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        self.growths = [event for event in events if event["event"] == "growth"]


class Study:
    """All runs of a study, and its tables."""

    def __init__(self, folder: Path) -> None:
        self.spec = yaml.safe_load((folder / "study.yaml").read_text())
        runs = [Run(path.parent) for path in sorted(folder.glob("cells/*/*/result.json"))]
        self.runs = [run for run in runs if run.seed in self.spec["seeds"]]
        self.tuning = [run for run in runs if run.seed not in self.spec["seeds"]]
        self.tables = tables((folder / "tables.md").read_text())
        self.checked = 0

    def of(self, condition: str, length: float = 1.0) -> dict[int, Run]:
        found = (run for run in self.runs if (run.condition, run.length) == (condition, length))
        return {run.seed: run for run in found}

    def losses(self, condition: str, length: float = 1.0) -> np.ndarray:
        return np.array([run.last["eval_loss"] for run in self.of(condition, length).values()])

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


def _unique(names: list[str]) -> list[str]:
    return [f"{name} (2)" if name in names[:place] else name for place, name in enumerate(names)]


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
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(low), float(high)


def check(folder: Path) -> int:
    """Compare every table; returns how many numbers were compared."""
    study = Study(folder)
    for part in (_arms, _outcome, _spread, _final, _comparisons, _savings, _equal_cost, _growths, _tuning):
        part(study)
    return study.checked


def _arms(study: Study) -> None:
    for row in study.tables["What each arm is"]:
        runs = list(study.of(row["condition"], float(row["length"])).values())
        study.same(row["learning rate"], *{run.lr for run in runs})
        first, last = runs[0].rows[0], runs[0].rows[-2:]
        study.same(row["layers"], *dict.fromkeys((first["depth"], last[-1]["depth"])))
        costs = {first["flops"] / first["tokens"]: None}
        before = next(each for each in reversed(runs[0].rows) if each["tokens"] < last[-1]["tokens"])
        if last[-1]["depth"] != first["depth"]:
            spent = last[-1]["flops"] - before["flops"]
            costs[spent / (last[-1]["tokens"] - before["tokens"])] = None
        study.same(row["FLOPs per token"], *costs)


def _outcome(study: Study) -> None:
    for row in study.tables["What came out"]:
        runs = list(study.of(row["condition"], float(row["length"])).values())

        def mean(of: Callable[[dict[str, Any]], float], runs: list[Run] = runs) -> float:
            return float(np.mean([of(run.last) for run in runs]))

        for column, key in (
            ("steps", "step"),
            ("tokens", "tokens"),
            ("FLOPs", "flops"),
            ("time", "elapsed_s"),
        ):
            study.same(row[column], mean(lambda last, key=key: last[key]))
        study.same(row["tokens/s"], mean(lambda last: last["tokens"] / last["elapsed_s"]))
        study.same(row["loss"], mean(lambda last: last["eval_loss"]))
        if runs[0].last["bits_per_byte"] is not None:
            study.same(row["bits/byte"], mean(lambda last: last["bits_per_byte"]))
        study.same(row["95 % interval"], *interval([run.last["eval_loss"] for run in runs]))
        study.same(row["seeds"], len(runs), len(study.spec["seeds"]))


def _spread(study: Study) -> None:
    for row in study.tables["Spread over the seeds"]:
        losses = study.losses(row["condition"], float(row["length"]))
        study.same(row["mean"], losses.mean())
        study.same(row["sd"], losses.std(ddof=1))
        study.same(row["median"], float(np.median(losses)))
        study.same(row["IQM"], stats.trim_mean(losses, 0.25))
        (low, _), (high, _) = numbers(row["95 % interval of the IQM"])
        assert losses.min() - 1e-3 <= low <= stats.trim_mean(losses, 0.25) + 1e-3
        assert stats.trim_mean(losses, 0.25) - 1e-3 <= high <= losses.max() + 1e-3


def _final(study: Study) -> None:
    for row in study.tables["Final loss of every run"]:
        for seed, run in study.of(row["condition"], float(row["length"])).items():
            study.same(row[f"seed {seed}"], run.last["eval_loss"])


def _comparisons(study: Study) -> None:
    rows = study.tables["Comparisons"]
    t_ps, flips = [], []
    for row in rows:
        arm, _, against = row["comparison"].partition(" − ")
        ours, theirs = study.of(arm), study.of(against)
        gaps = np.array(
            [ours[s].last["eval_loss"] - theirs[s].last["eval_loss"] for s in ours if s in theirs]
        )
        n = len(gaps)
        study.same(row["difference"], gaps.mean())
        study.same(row["95 % interval"], *interval(gaps))
        tested: Any = stats.ttest_1samp(gaps, 0.0)
        t_ps.append(float(tested.pvalue))
        signs = np.array(list(itertools.product((-1, 1), repeat=n)))
        flips.append(float(np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()) * (1 - 1e-12))))
        study.same(row["t test p"], t_ps[-1])
        study.same(row["sign-flip p"], flips[-1])
        study.same(row["d_z"], gaps.mean() / gaps.std(ddof=1))
        study.same(row["smallest p"], 2.0 ** (1 - n))
        study.same(row["detectable"], _detectable(gaps, 0.05 / len(rows)))
    for row, t_p, flip in zip(rows, _holm(t_ps), _holm(flips), strict=True):
        study.same(row["after Holm"], t_p)
        study.same(row["after Holm (2)"], flip)


def _holm(ps: Sequence[float]) -> list[float]:
    order, highest, found = np.argsort(ps), 0.0, dict[int, float]()
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        found[int(index)] = highest
    return [found[index] for index in range(len(ps))]


def _detectable(gaps: np.ndarray, alpha: float) -> float:
    """The true difference that a t test finds with power 0.8, by bisection on the noncentral F."""
    n, critical = len(gaps), stats.f.isf(alpha, 1, len(gaps) - 1)
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        power = stats.ncf.sf(critical, 1, n - 1, n * middle**2)
        low, high = (low, middle) if power >= 0.8 else (middle, high)
    return high * float(gaps.std(ddof=1))


def _curve(study: Study, baseline: str, seed: int, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the cost, and loss, of a baseline's runs of one seed; cheapest first."""
    runs = [run for run in study.runs if (run.condition, run.seed) == (baseline, seed)]
    points = sorted((math.log(run.last[COSTS[cost]]), run.last["eval_loss"]) for run in runs)
    return np.array([point[0] for point in points]), np.array([point[1] for point in points])


def _savings(study: Study) -> None:
    for row in study.tables["Cost of the same loss"]:
        arm, _, baseline = row["comparison"].partition(" against ")
        saved, spent, would = [], [], []
        for seed, run in study.of(arm).items():
            costs, losses = _curve(study, baseline, seed, row["cost"])
            loss = run.last["eval_loss"]
            if losses.min() <= loss <= losses.max():
                assert (np.diff(losses) < 0).all(), "a curve that does not fall is not checked here"
                would.append(math.exp(np.interp(-loss, -losses, costs)))
                spent.append(run.last[COSTS[row["cost"]]])
                saved.append(1 - spent[-1] / would[-1])
        study.same(row["seeds"], len(saved), len(study.of(arm)))
        if saved:
            study.same(row["spent"], float(np.mean(spent)))
            study.same(row["baseline's"], float(np.mean(would)))
            study.same(row["saved"], float(np.mean(saved)))
            study.same(row["speed-up"], 1 / (1 - float(np.mean(saved))))
        if len(saved) > 1:
            study.same(row["95 % interval"], *interval(saved))


def _equal_cost(study: Study) -> None:
    for row in study.tables["At equal cost"]:
        arm, _, baseline = row["comparison"].partition(" − ")
        gaps = []
        for seed, run in study.of(arm).items():
            costs, losses = _curve(study, baseline, seed, row["at equal"])
            cost = math.log(run.last[COSTS[row["at equal"]]])
            if costs.min() <= cost <= costs.max():
                gaps.append(run.last["eval_loss"] - np.interp(cost, costs, losses))
        study.same(row["seeds"], len(gaps), len(study.of(arm)))
        if gaps:
            study.same(row["difference"], float(np.mean(gaps)))
        if len(gaps) > 1:
            study.same(row["95 % interval"], *interval(gaps))


def _growths(study: Study) -> None:
    shown = next((rows for title, rows in study.tables.items() if title.startswith("Growths (")), [])
    found = {
        (run.condition, run.seed, growth["step"]): growth for run in study.runs for growth in run.growths
    }
    assert len(shown) == len(found)
    for row in shown:
        growth = found[row["condition"], int(row["seed"]), int(row["step"].replace(",", ""))]
        study.same(row["layers"], growth["depth_before"], growth["depth_after"])
        study.same(row["loss before"], growth["loss_before"])
        study.same(row["after"], growth["loss_after"])
        study.same(row["jump"], growth["loss_after"] - growth["loss_before"])


def _tuning(study: Study) -> None:
    for row in study.tables.get("Learning rates tried", []):
        tried = {run.lr: run.last["eval_loss"] for run in study.tuning if run.condition == row["condition"]}
        for lr, loss in tried.items():
            study.same(row[f"{lr:g}"], loss)
        study.same(row["chosen"], min(tried, key=lambda lr: tried[lr]))


if __name__ == "__main__":
    print(f"{check(Path(sys.argv[1]))} numbers of the tables are those of the raw records")
