"""What of a run's rows goes to a tracker, and under which names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiether.integrations import Row
from aiether.training import _format as fmt
from aiether.training._gaps import is_gap

_COMMON = {
    "depth": "model/depth",
    "stage": "model/stage",
    "tokens": "budget/tokens",
    "flops": "budget/flops",
    "elapsed_s": "budget/elapsed_s",
}
_TRAIN = ("loss", "grad_norm", "learning_rate", "steps_per_s", "tokens_per_s")
_GROWTH = ("depth_before", "depth_after", "loss_before", "loss_after")
_NAMES = {
    "train": _COMMON | {name: f"train/{name}" for name in _TRAIN},
    "eval": _COMMON
    | {
        "eval_loss": "eval/loss",
        "bits_per_byte": "eval/bits_per_byte",
        "eval_seconds": "eval/seconds",
        "eval_steps_per_s": "eval/steps_per_s",
    },
    "growth": {name: f"growth/{name}" for name in _GROWTH},
}


@dataclass(frozen=True)
class Entry:
    """One row of a tracker: numbers and texts by name, at a step."""

    step: int
    values: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)


def entry_of(kind: str, row: Row) -> Entry | None:
    """The entry of a row of a run; None for what trackers are not told.

    What an evaluation measured of the weights' trajectory comes under geometry/. What was not measured is
    left out; a loss that is not a number is passed on, for it is news.
    """
    step = int(row.get("step") or 0)
    if kind == "sample":
        return Entry(step, {}, {"sample": str(row["text"])})
    if kind == "phase":
        return Entry(step, {}, {"phase": f"layers in training: {fmt.anything(row.get('trainable'))}"})
    if kind not in _NAMES:
        return None
    names, numbers = _NAMES[kind], {key: float(value) for key, value in row.items() if _is_number(value)}
    values = {names[key]: value for key, value in numbers.items() if key in names}
    if kind == "eval":
        values |= {f"geometry/{key}": numbers[key] for key in numbers.keys() - names.keys() - {"step"}}
    if kind == "growth":
        return Entry(step, values | {"growth/step": step}, {"growth": _growth_words(row)})
    return Entry(step, values)


def _growth_words(event: Row) -> str:
    return (
        f"{event.get('depth_before')} to {event.get('depth_after')} layers "
        f"({fmt.plan_words(event.get('plan') or {})}): {event.get('reason')}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def history(arm_dir: Path) -> list[Entry]:
    """The entries of everything that an arm has on record, by step."""
    rows: list[tuple[str, Row]] = []
    for name, key in (("metrics.jsonl", "kind"), ("samples.jsonl", ""), ("events.jsonl", "event")):
        path = arm_dir / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        parsed = [row for row in map(json.loads, lines) if not is_gap(row)]
        rows += [(str(row[key]) if key else "sample", row) for row in parsed]
    rows.sort(key=lambda pair: int(pair[1].get("step") or 0))
    return [entry for kind, row in rows if (entry := entry_of(kind, row))]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested settings under dotted names, each a plain value: what every tracker takes as hyperparameters."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
