"""The numbers of a study's report, computed once more from the raw records of its runs.

    python -m tests.study.recompute STUDY_DIR

metrics.jsonl, events.jsonl and config.yaml of every run are read, and the statistics are written out with
NumPy and SciPy (`raw_records`). Every number of the tables (tables.md; the page shows the same) must be the
one found here, to the digits that are printed; so must those of the verdicts (`recompute_verdicts`). What the
figures draw is taken from the product's own drawings and must be what the records hold (`recompute_figures`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tests.study.raw_records import (
    Run,
    Study,
    at_equal_cost,
    at_equal_loss,
    detectable,
    effect,
    holm,
    interval,
    numbers,
    sign_flip,
    t_test,
)
from tests.study.recompute_figures import check_figures
from tests.study.recompute_verdicts import check_verdicts


def check(folder: Path) -> dict[str, int]:
    """Compare every table, verdict and figure; returns how many numbers of each were compared."""
    study, found = Study(folder), dict[str, int]()
    for name, part in {"tables": _tables, "verdicts": check_verdicts, "figures": check_figures}.items():
        before = study.checked
        part(study)
        found[name] = study.checked - before
    return found


def _tables(study: Study) -> None:
    if study.spec.get("factors"):
        _effects(study)
    else:
        _comparisons(study)
    for part in (_arms, _outcome, _spread, _final, _savings, _equal_cost, _growths, _tuning):
        part(study)


def _arms(study: Study) -> None:
    for row in study.tables["What each arm is"]:
        runs = list(study.of(row["condition"], float(row["length"])).values())
        study.same(row["learning rate"], *{run.lr for run in runs})
        first = next((each for each in runs[0].rows if each["tokens"]), None)
        if first is None:  # an arm that trains nothing has no cost to find out
            continue
        last = runs[0].rows[-2:]
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
        if any(run.last["elapsed_s"] for run in runs):
            study.same(row["tokens/s"], mean(lambda last: last["tokens"] / last["elapsed_s"]))
        else:  # an arm that trains nothing
            assert row["tokens/s"] == "–", row
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
    def gaps(row: dict[str, str]) -> np.ndarray:
        arm, _, against = row["comparison"].partition(" − ")
        return study.gaps(arm, against)

    rows = study.tables.get("Comparisons", [])
    assert len(rows) == len(study.results["comparisons"])
    _tests(study, rows, [gaps(row) for row in rows])


def _effects(study: Study) -> None:
    rows = study.tables["Effects of the factors"]
    _tests(study, rows, [effect(study, row["effect"]) for row in rows])


def _tests(study: Study, rows: list[dict[str, str]], contrasts: list[np.ndarray]) -> None:
    t_ps, flips = [], []
    for row, gaps in zip(rows, contrasts, strict=True):
        study.same(row["difference"], gaps.mean())
        study.same(row["95 % interval"], *interval(gaps))
        t_ps.append(t_test(gaps))
        flips.append(sign_flip(gaps))
        study.same(row["t test p"], t_ps[-1])
        study.same(row["sign-flip p"], flips[-1])
        if gaps.any():
            study.same(row["d_z"], gaps.mean() / gaps.std(ddof=1))
        study.same(row["smallest p"], 2.0 ** (1 - len(gaps)))
        study.same(row["detectable"], detectable(gaps, study.spec["alpha"] / len(rows)))
    for row, t_p, flip in zip(rows, holm(t_ps), holm(flips), strict=True):
        study.same(row["after Holm"], t_p)
        study.same(row["after Holm (2)"], flip)


def _savings(study: Study) -> None:
    for row in study.tables.get("Cost of the same loss", []):
        arm, _, baseline = row["comparison"].partition(" against ")
        found = at_equal_loss(study, arm, baseline, row["cost"]).values()
        inside = [each for each in found if each and not each.beyond]
        beyond = sum(each is not None and each.beyond for each in found)
        study.same(row["seeds"], len(inside), len(found))
        study.same(row["beyond"], beyond)
        if inside:
            study.same(row["spent"], float(np.mean([each.spent for each in inside])))
            study.same(row["baseline's"], float(np.mean([each.would for each in inside])))
        saved = [each.share for each in inside]
        if not saved or beyond:  # a mean would lack the seeds that did best
            assert row["saved"] == row["95 % interval"] == row["speed-up"] == "–", row
            continue
        study.same(row["saved"], float(np.mean(saved)))
        study.same(row["speed-up"], 1 / (1 - float(np.mean(saved))))
        if len(saved) > 1:
            study.same(row["95 % interval"], *interval(saved))


def _equal_cost(study: Study) -> None:
    for row in study.tables.get("At equal cost", []):
        arm, _, baseline = row["comparison"].partition(" − ")
        found = at_equal_cost(study, arm, baseline, row["at equal"]).values()
        gaps = [gap for gap in found if gap is not None]
        study.same(row["seeds"], len(gaps), len(found))
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
    checked = ", ".join(f"{count} of the {name}" for name, count in check(Path(sys.argv[1])).items())
    print(f"numbers that are those of the raw records: {checked}")
