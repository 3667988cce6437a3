"""How far a study is, read from its folder alone: another process may be running it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    """One run: where it stands, in steps, and how long it took or has taken so far (wall clock)."""

    cell: Cell
    status: CellStatus
    step: int = 0
    total_steps: int | None = None
    wall_s: float | None = None
    metric: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class StudyState:
    """All runs of a study, tuning first; those that tuning has not settled yet are among them."""

    spec: StudySpec
    cells: tuple[CellState, ...]

    def count(self, status: CellStatus) -> int:
        """How many runs stand so."""
        return sum(state.status == status for state in self.cells)

    def time_left(self) -> float | None:
        """Seconds, from what finished runs took of the same length; None before any has finished."""
        done = [(s.wall_s, s.cell.length) for s in self.cells if s.status == "finished" and s.wall_s]
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
    wanted = (*tuning_cells(spec), *cells(spec, chosen))
    return StudyState(spec, tuple(_cell_state(spec, study_dir, cell, failed) for cell in wanted))


def _failed(study_dir: Path) -> dict[str, str]:
    """Runs whose last attempt of all was used up, and why; a later success wins over it."""
    rows = read_rows(study_dir / ATTEMPTS)
    return {row["folder"]: row["reason"] for row in rows if row["attempt"] >= MAX_ATTEMPTS}


def _cell_state(spec: StudySpec, study_dir: Path, cell: Cell, failed: dict[str, str]) -> CellState:
    folder = study_dir / cell.folder
    config = folder / "config.yaml"
    if not config.is_file():
        reason = failed.get(cell.folder)
        return CellState(cell, "waiting" if reason is None else "failed", reason=reason)
    began = config.stat().st_mtime
    if is_finished(folder):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        wall_s = (folder / "summary.json").stat().st_mtime - began
        steps = result["steps"]
        return CellState(cell, "finished", steps, steps, wall_s, result[spec.metric])
    step, total = _progress(folder)
    if _is_held(folder):
        return CellState(cell, "running", step, total)
    reason = failed.get(cell.folder)
    return CellState(cell, "stopped" if reason is None else "failed", step, total, reason=reason)


def _progress(folder: Path) -> tuple[int, int | None]:
    rows = read_rows(folder / "metrics.jsonl")
    lineage = folder / "lineage.json"
    total = json.loads(lineage.read_text(encoding="utf-8"))["steps"] if lineage.is_file() else None
    return (rows[-1]["step"] if rows else 0), total


def _is_held(folder: Path) -> bool:
    """Whether a process that lives is on a run; on another host it is taken to live."""
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
