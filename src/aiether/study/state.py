"""How far a study is, read from its folder alone: another process may be running it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .arms import Cell, cells, tuning_cells
from .cell import is_finished
from .results import choose_rates, read_rows
from .spec import StudySpec, read_spec

SPEC, ABOUT, RESULTS = "study.yaml", "about.json", "results.json"
WORKERS, ATTEMPTS = "workers.json", "attempts.jsonl"
MAX_ATTEMPTS = 2
CellStatus = Literal["finished", "running", "failed", "stopped", "waiting"]


@dataclass(frozen=True)
class CellState:
    """One run: where it stands, in steps, and how many seconds it trained."""

    cell: Cell
    status: CellStatus
    step: int = 0
    total_steps: int | None = None
    train_seconds: float | None = None
    metric: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class StudyState:
    """All runs of a study, tuning first; those that tuning has not settled yet are among them."""

    spec: StudySpec
    cells: tuple[CellState, ...]
    is_running: bool

    def count(self, status: CellStatus) -> int:
        """How many runs stand so."""
        return sum(state.status == status for state in self.cells)

    def time_left(self) -> float | None:
        """Seconds of training, from what finished runs took of their length; None before any has finished."""
        done = [(s.train_seconds, s.cell.length) for s in self.cells if s.train_seconds]
        if not done:
            return None
        per_length = sum(wall for wall, _ in done) / sum(length for _, length in done)
        left = sum(
            s.cell.length * (1 - _share(s)) for s in self.cells if s.status not in ("finished", "failed")
        )
        return left * per_length / max(1, self.count("running"))


def _share(state: CellState) -> float:
    return state.step / state.total_steps if state.total_steps else 0.0


def open_study(study_dir: Path) -> StudySpec:
    """The specification in a study's folder.

    Raises
    ------
    ValueError
        If there is none.
    """
    path = study_dir / SPEC
    if not path.is_file():
        raise ValueError(
            f"{str(study_dir)!r} holds no study ({SPEC} is missing); name the folder of `aiether study run`"
        )
    return read_spec(path)


def study_state(study_dir: Path) -> StudyState:
    """Where every run of a study stands now."""
    spec = open_study(study_dir)
    chosen = choose_rates(spec, study_dir)
    failed = _failed(study_dir)
    tuning = [_cell_state(spec, study_dir, cell, failed) for cell in tuning_cells(spec)]
    lost = untuned(spec, chosen, {state.cell for state in tuning if state.status == "failed"})
    runs = [
        CellState(cell, "failed", reason=lost[cell])
        if cell in lost
        else _cell_state(spec, study_dir, cell, failed)
        for cell in cells(spec, chosen)
    ]
    return StudyState(spec, (*tuning, *runs), is_held(study_dir))


def append_attempts_mark(study_dir: Path) -> None:
    """Note that the runner began once more: what failed before is tried again."""
    append_row(study_dir / ATTEMPTS, {"began": True})


def _failed(study_dir: Path) -> dict[str, str]:
    """Runs that used up their attempts since the runner last began, and why."""
    found: dict[str, str] = {}
    for row in _attempts(study_dir / ATTEMPTS):
        if "began" in row:
            found.clear()
        elif row["attempt"] >= MAX_ATTEMPTS:
            found[row["folder"]] = row["reason"]
    return found


def _attempts(path: Path) -> list[dict[str, Any]]:
    """The rows of attempts.jsonl; half a row, which a kill leaves, is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a JSONL file, on a line of its own even where a kill left half a line."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def untuned(spec: StudySpec, chosen: Mapping[str, float], failed: Container[Cell]) -> dict[Cell, str]:
    """The runs that have no learning rate since all runs that were to choose it failed, and that reason."""
    tuning = tuning_cells(spec)
    lost = {
        name
        for name in (spec.all_conditions() if tuning else ())
        if name not in chosen and all(cell in failed for cell in tuning if cell.condition == name)
    }
    reason = "no learning rate: all runs of its tuning failed"
    return {cell: reason for cell in cells(spec, chosen) if cell.condition in lost}


def _cell_state(spec: StudySpec, study_dir: Path, cell: Cell, failed: dict[str, str]) -> CellState:
    folder = study_dir / cell.folder
    config = folder / "config.yaml"
    if not config.is_file():
        reason = failed.get(cell.folder)
        return CellState(cell, "waiting" if reason is None else "failed", reason=reason)
    if is_finished(folder):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        steps = result["steps"]
        return CellState(cell, "finished", steps, steps, result["elapsed_s"], result[spec.metric])
    step, total = progress_of(folder)
    if is_held(folder):
        return CellState(cell, "running", step, total)
    reason = failed.get(cell.folder)
    return CellState(cell, "stopped" if reason is None else "failed", step, total, reason=reason)


def progress_of(folder: Path) -> tuple[int, int | None]:
    """Steps that a run has recorded, and how many it has; None before it has planned them."""
    rows = read_rows(folder / "metrics.jsonl")
    lineage = folder / "lineage.json"
    total = json.loads(lineage.read_text(encoding="utf-8"))["steps"] if lineage.is_file() else None
    return (rows[-1]["step"] if rows else 0), total


def is_held(folder: Path) -> bool:
    """Whether a process that lives is on a run or a study; on another host it is taken to live."""
    try:
        holder = json.loads((folder / "run.lock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
