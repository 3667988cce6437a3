"""What a run folder holds, read into memory. Every file but `metrics.jsonl` may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import filterfalse
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aiether.training._gaps import is_gap
from aiether.training.settings_file import read_settings_file

T = TypeVar("T")
_MOST = 1e15
Row = Mapping[str, Any]
Column = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Rows of one kind in the order of their steps."""

    rows: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Column:
        """One field over all rows, float64 of shape (len(self),); NaN where it is absent or null."""
        return np.array([as_number(row.get(name)) for row in self.rows], dtype=np.float64)

    def last(self, name: str) -> float | None:
        """The newest finite value of a field, or None if there is none."""
        values = self.column(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None


@dataclass(frozen=True)
class Layer:
    """One layer of the model as it stands at the end, with its origin."""

    layer_id: int
    born_step: int
    parent: int | None
    init: str


@dataclass(frozen=True)
class Run:
    """A recorded run. `layers` is in the final order of the stack, from the input to the output."""

    name: str
    train: Table
    evals: Table
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    events: tuple[Row, ...] = ()
    layers: tuple[Layer, ...] = ()
    summary: Row | None = None
    samples: tuple[Row, ...] = ()
    baselines: tuple[Run, ...] = ()
    gaps: tuple[tuple[str, int], ...] = ()  # files with rows missing, and the step of the last row before

    @property
    def growths(self) -> tuple[Row, ...]:
        return tuple(event for event in self.events if event.get("event") == "growth")

    @cached_property
    def growth_steps(self) -> tuple[int, ...]:
        return tuple(int(event["step"]) for event in self.growths)

    @property
    def last_step(self) -> int:
        return int(max(self.train.last("step") or 0, self.evals.last("step") or 0))

    @property
    def latest_loss(self) -> float | None:
        """The final evaluation loss in nats per token, or the newest one of a run that has not ended."""
        return self.latest("eval_loss")

    def latest(self, name: str) -> float | None:
        """A figure of the whole run: the summary's, else the newest one that was recorded."""
        value = as_number((self.summary or {}).get(name))
        if np.isfinite(value):
            return float(value)
        tables = sorted((self.train, self.evals), key=lambda table: table.last("step") or 0)
        newest = [value for table in tables if (value := table.last(name)) is not None]
        return newest[-1] if newest else None


def as_number(value: Any) -> float:
    """A float, or NaN for whatever is not a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else float("nan")
    except OverflowError:  # a whole number of more than 308 digits
        return float("nan")


def load_run(run_dir: Path) -> Run:
    """Reads a run folder, finished or interrupted, with the baselines inside it.

    Raises:
        ValueError: `run_dir` holds no `metrics.jsonl`, or one of its files is damaged.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(
            f"{run_dir} is not the folder of a run: it holds no metrics.jsonl. "
            "Give the folder that `aiether train` named when it started."
        )
    found = sorted(path.parent for path in run_dir.glob("baseline-*/metrics.jsonl"))
    baselines = tuple(_load_one(path, path.name.removeprefix("baseline-"), ()) for path in found)
    return _load_one(run_dir, run_dir.resolve().name, baselines)


def read_metrics(path: Path) -> tuple[Table, Table, tuple[int, ...]]:
    """A `metrics.jsonl`: its training rows, its evaluations, and the last step before each gap in it.

    Raises:
        ValueError: A line of it is damaged.
    """
    rows = read_json_lines(path, _is_measurement)
    gaps = tuple(int(row.get("step") or 0) for row in filter(is_gap, rows))
    return table_of("train", rows), table_of("eval", rows), gaps


def _load_one(run_dir: Path, name: str, baselines: tuple[Run, ...]) -> Run:
    rows = {
        "metrics.jsonl": read_json_lines(run_dir / "metrics.jsonl", _is_measurement),
        "events.jsonl": read_json_lines(run_dir / "events.jsonl", _is_event),
        "samples.jsonl": read_json_lines(run_dir / "samples.jsonl", _has_step),
    }
    config = run_dir / "config.yaml"
    return Run(
        name=name,
        train=table_of("train", rows["metrics.jsonl"]),
        evals=table_of("eval", rows["metrics.jsonl"]),
        config=read_settings_file(config) if config.is_file() else {},
        environment=_read(run_dir / "environment.json", _object) or {},
        events=_ordered_events(filterfalse(is_gap, rows["events.jsonl"])),
        layers=_read(run_dir / "lineage.json", lambda text: layers_of(_object(text))) or (),
        summary=_read(run_dir / "summary.json", _object),
        samples=tuple(filterfalse(is_gap, rows["samples.jsonl"])),
        baselines=baselines,
        gaps=tuple((file, int(row.get("step") or 0)) for file in rows for row in filter(is_gap, rows[file])),
    )


def _object(text: str) -> Row:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _is_count(value: Any) -> bool:
    """A number of steps or layers that int takes and a figure can show."""
    return 0 <= as_number(value) < _MOST


def _has_step(row: Row) -> bool:
    return _is_count(row.get("step", 0))


def _is_measurement(row: Row) -> bool:
    return _is_count(row.get("step")) if row.get("kind") in ("train", "eval") else _has_step(row)


def _is_event(row: Row) -> bool:
    if row.get("event") != "growth":
        return _has_step(row) and not isinstance(row.get("event"), list | dict)
    counts = all(_is_count(row.get(name)) for name in ("step", "depth_before", "depth_after"))
    tensors = row.get("tensors") or {}
    return (
        counts
        and isinstance(tensors, dict)
        and all(isinstance(metrics, dict) for metrics in tensors.values())
        and _is_plan(row.get("plan") or {})
    )


def _is_plan(plan: Any) -> bool:
    try:
        return all(_is_count(origin["source"]) for origin in plan.get("layers", ()))
    except (AttributeError, KeyError, TypeError):
        return False


def table_of(kind: str, rows: Iterable[Row]) -> Table:
    """The rows of one kind, by step. Of a step that a resumed run went through twice, the last one counts."""
    by_step = {int(row["step"]): row for row in rows if row.get("kind") == kind}
    return Table(tuple(by_step[step] for step in sorted(by_step)))


def _ordered_events(events: Iterable[Row]) -> tuple[Row, ...]:
    """Events by step, each growth once: a resumed run may write the same growth again."""
    once = {
        (event.get("event"), event.get("step")) if event.get("event") == "growth" else index: event
        for index, event in enumerate(events)
    }
    return tuple(sorted(once.values(), key=lambda event: int(event.get("step") or 0)))


def layers_of(lineage: Row) -> tuple[Layer, ...]:
    """The layers of a `lineage.json`, in the order of the stack.

    Raises:
        ValueError: Two of them have one id, or a number is none.
    """
    layers = tuple(
        Layer(
            layer_id=int(record["id"]),
            born_step=int(record["born_step"]),
            parent=None if record.get("parent") is None else int(record["parent"]),
            init=str(record.get("init") or ""),
        )
        for record in lineage.get("records", ())
    )
    if len({layer.layer_id for layer in layers}) < len(layers):
        raise ValueError("two layers have one id")
    if not all(_is_count(layer.born_step) for layer in layers):
        raise ValueError("a layer was born at no step")
    return layers


def read_json_lines(path: Path, fits: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """The objects of a JSON-lines file; a last line cut off by a kill is left out.

    Raises:
        ValueError: A line other than the last one is not JSON, or an object does not fit.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode()) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON. Remove the line and try again.") from error
        if isinstance(row, dict):
            if not fits(row):
                raise ValueError(
                    f"{path}, line {number} is damaged (a number is missing or is none). "
                    "Remove the line and try again."
                )
            rows.append(row)
    return rows


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = "it is no JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else error
        raise ValueError(f"{path} is damaged ({reason}). Move it away and write the report again.") from error
