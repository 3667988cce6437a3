"""What the figures draw, taken from the drawings themselves, must be what the raw records hold.

The report's own functions make the drawings; their lines and points are read as numbers, in the units of the
axes, and computed once more from metrics.jsonl and events.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.testing import assert_allclose
from tests.study.raw_records import Run, Study, at_equal_loss, effect, interval

from aiether.study.report._curves import read_records
from aiether.study.report._figures import LOSS_FIGURES, LossFigure, lines_of, loss_picture
from aiether.study.report._pareto import pareto_picture
from aiether.study.report._results import Study as Results
from aiether.study.report._results import read_results
from aiether.study.report._rows import SAVINGS, differences, effects, final_loss, savings
from aiether.training.report.theme import Picture

Points = Sequence[tuple[float, float]]
SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
PARETO_COST = {"flops": "flops", "seconds": "elapsed_s"}
ROWS_COST = {"tokens": "tokens", "flops": "FLOPs", "seconds": "training time"}


def check_figures(study: Study) -> None:
    """Loss curves, Pareto fronts, savings, differences and final losses."""
    shown = read_results(study.folder)
    records, lost = read_records(shown, study.folder)
    assert not lost, lost
    lines = [(line.arm.condition, line.arm.length, line.full) for line in lines_of(shown, records)]
    lines = [line for line in lines if any(run.last["tokens"] for run in study.of(*line[:2]).values())]
    for figure in LOSS_FIGURES:
        _loss(study, lines, figure, loss_picture(shown, lines_of(shown, records), figure))
    for cost in PARETO_COST:
        _pareto(study, shown, cost)
    _final(study, shown)
    if shown.factorial:
        _effects(study, shown)
    elif study.results["comparisons"]:
        _differences(study, shown)
    _savings(study, {picture.key: picture for picture in savings(shown)})


def _axes(picture: Picture | None) -> Axes:
    assert picture is not None, "a figure is missing"
    (axes,) = picture.figure.axes
    return axes


def _unit(axes: Axes) -> float:
    """Seconds in a unit of the axis, as its label says."""
    return SECONDS[axes.get_xlabel().rpartition(", ")[2]]


def _same(study: Study, found: Any, wanted: Any) -> None:
    assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=1e-9, atol=1e-12)
    study.checked += int(np.size(wanted))


def _points(line: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def _marks(axes: Axes) -> dict[str, tuple[float, float]]:
    """What has an id: single points."""
    return {
        str(line.get_gid()): (float(x[0]), float(y[0]))
        for line in axes.lines
        if line.get_gid()
        for x, y in (_points(line),)
    }


# -- loss curves ------------------------------------------------------------------------------------------


def _loss(study: Study, lines: Sequence[tuple[str, float, bool]], figure: LossFigure, picture: Any) -> None:
    axes = _axes(picture)
    unit = _unit(axes) if figure.x == "elapsed_s" else 1.0
    drawn = [_points(line) for line in axes.lines if not line.get_gid()]
    bands = [np.asarray(each.get_paths()[0].vertices) for each in axes.collections]
    marks, growths = _marks(axes), dict[str, tuple[float, float]]()
    for number, (condition, length, full) in enumerate(lines):
        runs = list(study.of(condition, length).values())
        x, mean, low, high = _band(study, runs, figure.x, unit, len(drawn[number][0]))
        _same(study, drawn[number], (x, mean))
        if full and len(runs) > 1:
            _same_outline(study, bands.pop(0), [*zip(x, low, strict=True), *zip(x, high, strict=True)])
        if full:
            for k, place in enumerate(_growths(runs, figure.x)):
                growths[f"growth{number}-{k}"] = place / unit, float(np.interp(place / unit, x, mean))
    assert len(drawn) == len(lines)
    assert not bands
    _same_marks(study, marks, growths)


def _band(
    study: Study, runs: Sequence[Run], x: str, unit: float, points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, least and greatest of the runs at equal shares of their way."""
    curves = [(_column(run, x) / unit, _column(run, study.spec["metric"])) for run in runs]
    if len(curves) == 1:
        return curves[0][0], curves[0][1], curves[0][1], curves[0][1]
    shares = np.arange(points) / (points - 1)
    ways = [own[0] + (own[-1] - own[0]) * shares for own, _ in curves]
    losses = [np.interp(way, *curve) for way, curve in zip(ways, curves, strict=True)]
    return np.mean(ways, axis=0), np.mean(losses, axis=0), np.min(losses, axis=0), np.max(losses, axis=0)


def _growths(runs: Sequence[Run], x: str) -> list[float]:
    """Where the first, second, ... growths of the runs lie, on average."""
    places = []
    for k in range(max(len(run.growths) for run in runs)):
        grown = [run for run in runs if len(run.growths) > k]
        places.append(float(np.mean([_place(run, run.growths[k]["step"], x) for run in grown])))
    return places


def _place(run: Run, step: int, x: str) -> float:
    """Where a step lies, between the evaluations around it."""
    return float(step) if x == "step" else float(np.interp(step, _column(run, "step"), _column(run, x)))


def _column(run: Run, name: str) -> np.ndarray:
    return np.array([row[name] for row in run.evals], dtype=float)


def _same_outline(study: Study, found: np.ndarray, wanted: Points) -> None:
    """The corners of a filled band, in whatever order it goes round them."""
    size = np.abs(np.asarray(wanted)).max(axis=0)
    near = np.abs(found[:, None] - np.asarray(wanted)[None]) / size < 1e-9
    together = near.all(axis=2)
    assert together.any(axis=0).all(), "a corner of the band is not drawn"
    assert together.any(axis=1).all(), "the band has a corner that the records do not"
    study.checked += 2 * len(wanted)


def _same_marks(
    study: Study, found: Mapping[str, tuple[float, float]], wanted: Mapping[str, tuple[float, float]]
) -> None:
    assert found.keys() == wanted.keys()
    for gid, point in wanted.items():
        _same(study, found[gid], point)


# -- Pareto -----------------------------------------------------------------------------------------------


def _pareto(study: Study, shown: Results, cost: str) -> None:
    axes = _axes(pareto_picture(shown, cost))
    unit = _unit(axes) if cost == "seconds" else 1.0
    arms = [(arm.condition, arm.length) for arm in shown.arms]
    assert set(arms) == {(run.condition, run.length) for run in study.runs}
    arms = [arm for arm in arms if any(run.last["tokens"] for run in study.of(*arm).values())]
    points, ranges = [], []
    for arm in arms:
        runs = list(study.of(*arm).values())
        losses = [run.last[study.spec["metric"]] for run in runs]
        points.append(
            (float(np.mean([run.last[PARETO_COST[cost]] for run in runs])) / unit, float(np.mean(losses)))
        )
        ranges.append((min(losses), max(losses)))
    _same_marks(study, _marks(axes), {f"point{number}": point for number, point in enumerate(points)})
    plain = [_points(line) for line in axes.lines if not line.get_gid()]
    front = sorted(p for p in points if not any(_beats(other, p) for other in points))
    _same(study, np.asarray(axes.collections[0].get_offsets()), front)
    _same(study, plain[0], np.transpose(front))
    for (x, _), ends, bar in zip(points, ranges, plain[1:], strict=False):
        _same(study, bar, ((x, x), ends))
    curves = plain[1 + len(points) :]
    lined = [name for name in shown.baselines if sum(arm[0] == name for arm in arms) > 1]
    for name, curve in zip(lined, curves, strict=True):
        own = sorted(point for arm, point in zip(arms, points, strict=True) if arm[0] == name)
        _same(study, curve, np.transpose(own))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


# -- rows -------------------------------------------------------------------------------------------------


def _rows(
    study: Study, picture: Picture | None, rows: Sequence[Mapping[int, float]], whole: Sequence[bool]
) -> None:
    """Each row's points by seed, and its mean and interval where the row is `whole`."""
    axes = _axes(picture)
    marks, wanted = _marks(axes), dict[str, tuple[float, float]]()
    intervals = {
        round(float(y[0]), 6): x for x, y in map(_points, axes.lines) if len(x) == 2 and y[0] == y[1]
    }
    for place, (row, complete) in enumerate(zip(rows, whole, strict=True)):
        wanted |= {f"row{place}-{seed}": (value, float(place)) for seed, value in row.items()}
        if complete and len(row) > 1:
            values = list(row.values())
            wanted[f"interval{place}"] = float(np.mean(values)), place + 0.24
            _same(study, intervals[round(place + 0.24, 6)], interval(values))
    _same_marks(study, marks, wanted)


def _final(study: Study, shown: Results) -> None:
    full = [(name, 1.0) for name in shown.conditions]
    others = sorted(
        ((arm.condition, arm.length) for arm in shown.arms if arm.length != 1.0), key=lambda arm: arm[1]
    )
    rows = [
        {seed: run.last[study.spec["metric"]] for seed, run in study.of(*arm).items()}
        for arm in (*full, *others)
    ]
    _rows(study, final_loss(shown), rows, [True] * len(rows))


def _effects(study: Study, shown: Results) -> None:
    rows = [dict(enumerate(effect(study, row["effect"]))) for row in study.results["factorial"]]
    _rows(study, effects(shown), rows, [True] * len(rows))


def _differences(study: Study, shown: Results) -> None:
    rows = [
        dict(zip(study.of(arm), study.gaps(arm, against), strict=True)) for arm, against in shown.declared
    ]
    _rows(study, differences(shown), rows, [True] * len(rows))


def _savings(study: Study, pictures: Mapping[str, Picture]) -> None:
    """A row for each arm that has a figure; no mean where seeds lie beyond the baseline's longest run."""
    for cost, (key, _) in SAVINGS.items():
        rows, whole = [], []
        for row in study.results["savings"]:
            if row["cost"] == cost:
                found = at_equal_loss(study, row["arm"], row["against"], ROWS_COST[cost])
                inside = {seed: each for seed, each in found.items() if each and not each.beyond}
                rows.append({seed: 100 * each.share for seed, each in inside.items()})
                whole.append(not any(each and each.beyond for each in found.values()))
        kept = [place for place, row in enumerate(rows) if row]
        if kept or key in pictures:
            _rows(study, pictures[key], [rows[k] for k in kept], [whole[k] for k in kept])
