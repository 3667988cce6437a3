"""The raw records of cells as curves, and bands over the seeds of an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aiether.study.report._results import Arm, Cell, Study
from aiether.training.report.run_records import Table, read_metrics
from aiether.training.report.series import finite, smooth, thin

Column = NDArray[np.float64]
GRID_POINTS = 160
_EVALS = ("step", "tokens", "flops", "elapsed_s", "eval_loss", "bits_per_byte")
_TRAIN = ("step", "tokens_per_s", "grad_norm")


@dataclass(frozen=True)
class Record:
    """What a cell recorded, a column a field; float64."""

    cell: Cell
    evals: Mapping[str, Column]
    train: Mapping[str, Column]


def read_records(study: Study, study_dir: Path) -> tuple[dict[int, tuple[Record, ...]], tuple[str, ...]]:
    """The records of each arm, by its place in `study.arms`, and a sentence for each that is not there.

    Raises:
        ValueError: A record is damaged, or a cell's folder lies outside the study's.
    """
    found: dict[int, tuple[Record, ...]] = {}
    lost: list[str] = []
    for place, arm in enumerate(study.arms):
        records: list[Record] = []
        for cell in arm.finished:
            path = _folder(study_dir, cell) / "metrics.jsonl"
            if not path.is_file():
                lost.append(f"{cell.folder or 'a run'} holds no metrics.jsonl: the curves lack it.")
                continue
            train, evals, gaps = read_metrics(path)
            lost += [f"metrics.jsonl of {cell.folder}: rows after step {gap:,} are missing." for gap in gaps]
            records.append(Record(cell, _columns(evals, _EVALS), _columns(train, _TRAIN)))
        found[place] = tuple(records)
    return found, tuple(lost)


def _folder(study_dir: Path, cell: Cell) -> Path:
    folder = study_dir / cell.folder
    if not folder.resolve().is_relative_to(study_dir.resolve()):
        raise ValueError(
            f"{study_dir / 'results.json'} names {cell.folder!r}, which lies outside the study's folder. "
            "Run `aiether study run` on it again."
        )
    return folder


def _columns(table: Table, names: Sequence[str]) -> dict[str, Column]:
    return {name: table.column(name) for name in names}


@dataclass(frozen=True)
class Band:
    """The curve of an arm: mean, least and greatest over its seeds. `stretched`: they end at different x."""

    x: Column
    mean: Column
    low: Column
    high: Column
    seeds: int
    stretched: bool = False


def band_of(curves: Sequence[tuple[Column, Column]], points: int = GRID_POINTS) -> Band | None:
    """Curves (x, y) joined at equal shares of their way from their first x to their last.

    Every seed counts with all that it recorded, also where one took longer than another. A curve of one
    point is left out; None where no other is left.
    """
    curves = [curve for curve in (finite(*each) for each in curves) if len(curve[0]) > 1]
    if not curves:
        return None
    if len(curves) == 1:
        x, y = thin(*curves[0], limit=2 * points)
        return Band(x, y, y, y, 1)
    shares = np.linspace(0.0, 1.0, points)
    grids = np.stack([x[0] + shares * (x[-1] - x[0]) for x, _ in curves])
    rows = np.stack([np.interp(grid, x, y) for grid, (x, y) in zip(grids, curves, strict=True)])
    apart = bool(np.ptp(grids[:, -1]) > 0.005 * np.abs(grids[:, -1]).max())
    return Band(grids.mean(axis=0), rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0), len(curves), apart)


def loss_curves(records: Sequence[Record], x: str, metric: str) -> list[tuple[Column, Column]]:
    """Evaluations of each record over one of its costs; `elapsed_s` for training time."""
    return [(each.evals[x], each.evals[metric]) for each in records if metric in each.evals]


def train_curves(records: Sequence[Record], y: str) -> list[tuple[Column, Column]]:
    """A column of the training rows over steps, smoothed, but never across a growth."""
    curves = [(each.cell, *finite(each.train["step"], each.train[y])) for each in records]
    return [(x, smooth(x, values, [g.step for g in cell.growths])) for cell, x, values in curves]


@dataclass(frozen=True)
class Mark:
    """The growths of an arm that are one another's counterpart: where they lie in x, and in words."""

    x: float
    words: str


def growth_marks(arm: Arm, records: Sequence[Record], x: str) -> list[Mark]:
    """The k-th growth of every seed as one mark, at their mean."""
    most = max((len(each.cell.growths) for each in records), default=0)
    marks: list[Mark] = []
    for k in range(most):
        grown = [each for each in records if len(each.cell.growths) > k]
        steps = [each.cell.growths[k].step for each in grown]
        places = [_at_step(each, x, step) for each, step in zip(grown, steps, strict=True)]
        ways = dict.fromkeys(
            f"{each.cell.growths[k].depth_before:g}→{each.cell.growths[k].depth_after:g}" for each in grown
        )
        when = f"{min(steps):,.0f}" if min(steps) == max(steps) else f"{min(steps):,.0f} to {max(steps):,.0f}"
        text = f"{arm.condition}: {', '.join(ways)} layers at step {when}"
        marks.append(Mark(float(np.mean(places)), text))
    return [mark for mark in marks if np.isfinite(mark.x)]


def _at_step(record: Record, x: str, step: float) -> float:
    if x == "step":
        return step
    steps, values = finite(record.evals["step"], record.evals[x])
    return float(np.interp(step, steps, values)) if len(steps) else float("nan")
