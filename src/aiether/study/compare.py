"""Two studies or single runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiether.training import _format as fmt

from .state import RESULTS

COLUMNS = ("from", "arm", "loss", "95 %", "bits per byte", "layers", "tokens", "FLOPs", "seconds", "seeds")


@dataclass(frozen=True)
class Side:
    """One line of the table."""

    source: str
    arm: str
    losses: tuple[float, ...]
    bits: tuple[float, ...]
    depth: float
    tokens: float
    flops: float
    seconds: float
    interval: tuple[float, float] | None

    def words(self) -> tuple[str, ...]:
        """As it is printed."""
        interval = "" if self.interval is None else f"{self.interval[0]:.4f} to {self.interval[1]:.4f}"
        return (
            self.source,
            self.arm,
            f"{_mean(self.losses):.4f}",
            interval,
            f"{_mean(self.bits):.4f}" if self.bits else "",
            f"{self.depth:g}",
            fmt.count(round(self.tokens)),
            fmt.scientific(self.flops),
            f"{self.seconds:,.1f}",
            str(len(self.losses)),
        )


def sides(folder: Path) -> list[Side]:
    """The arms of a study, or a run with its baselines.

    Raises
    ------
    ValueError
        If the folder is neither, or has not finished.
    """
    if (folder / RESULTS).is_file():
        return _of_study(folder)
    if (folder / "result.json").is_file():
        arms = [folder, *sorted(folder.glob("baseline-*"))]
        return [_of_run(folder, arm) for arm in arms if (arm / "result.json").is_file()]
    raise ValueError(
        f"{str(folder)!r} holds neither a study's results.json nor a run's result.json: name the folder of a "
        "finished run, or write a study's results with `aiether study report`"
    )


def _of_study(folder: Path) -> list[Side]:
    results = _read(folder / RESULTS)
    found = []
    for entry in results["arms"]:
        rows = [row for row in entry["cells"] if row["status"] == "finished"]
        if not rows:
            continue
        length = "" if entry["length"] == 1.0 else f" x{entry['length']:g}"
        found.append(_side(folder.name, entry["condition"] + length, rows))
    return found


def _of_run(folder: Path, arm: Path) -> Side:
    result = _read(arm / "result.json")
    return _side(folder.name, result["name"], [result | {"timings": {"seconds": result["elapsed_s"]}}])


def _side(source: str, arm: str, rows: Sequence[dict[str, Any]]) -> Side:
    from .statistics import mean_interval

    losses = tuple(row["eval_loss"] for row in rows)
    return Side(
        source=source,
        arm=arm,
        losses=losses,
        bits=tuple(row["bits_per_byte"] for row in rows if row["bits_per_byte"] is not None),
        depth=_mean([row["depth"] for row in rows]),
        tokens=_mean([row["tokens"] for row in rows]),
        flops=_mean([row["flops"] for row in rows]),
        seconds=_mean([row["timings"]["seconds"] for row in rows]),
        interval=mean_interval(losses).ci95,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); write it again") from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def markdown(rows: Sequence[Side]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.words() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
