"""The run folder looked at before anything long begins: may a run begin there, may this one go on?"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from .config import TrainConfig

T = TypeVar("T")
CONTENTS = frozenset(
    {
        "baseline-static",
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "final",
        "layers",
        "lineage.json",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "samples.jsonl",
        "snapshots",
        "summary.json",
        "tensorboard",
        "wandb",
        "window",
    }
)
"""What a run writes into its folder, and would replace there. `environment.json` comes before the run does:
a start that was killed leaves no more than that."""

CHANGEABLE = (
    "on_nan",
    "max_skipped_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "cuda_graphs",
    "snapshot_storage",
    "device",
    "save_interval_steps",
    "keep_checkpoints",
    "cache_dir",
    "sample_prompt",
)
"""Settings that may change when a run goes on; what a step consists of stays."""

# Edited in config.yaml these are fine: a folder or a text that was moved (its content is compared), a
# baseline that was an afterthought, and the batches of an evaluation, which follow batch_size.
_EDITABLE = frozenset(
    {*CHANGEABLE, "output_dir", "dataset_path", "tokenizer", "baseline", "preset", "eval_batches"}
)


def check_place(path: Path) -> None:
    """Raise ValueError unless `path` is, or can become, a folder that can be written."""
    place = next(folder for folder in (path, *path.absolute().parents) if _exists(folder))
    if not place.is_dir():
        raise ValueError(
            f"output_dir {str(path)!r} cannot be a folder: {str(place)!r} is a file; name another place"
        )
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(
            f"output_dir {str(path)!r} cannot be written ({error.strerror or error}); name another place, or "
            f"change the rights of {str(place)!r}"
        ) from error


def check_output_dir(path: Path) -> None:
    """Raise ValueError unless a new run can be written to `path` without replacing anything."""
    check_place(path)
    if not path.is_dir():
        return
    if (path / "config.yaml").exists():
        raise ValueError(
            f"output_dir {str(path)!r} holds a run already; go on with --resume {path}, or name another"
        )
    taken = sorted(CONTENTS & {entry.name for entry in path.iterdir()})
    if taken:
        raise ValueError(
            f"output_dir {str(path)!r} holds {', '.join(taken)} already, which a run would replace; name a "
            "new or an empty folder"
        )


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"output_dir {str(path)[:60]!r}... is too long; name a shorter one") from None
        raise
    return True


def read_record(path: Path, read: Callable[[Any], T], advice: str) -> T:
    """What `read` makes of a JSON file of a run.

    Raises
    ------
    ValueError
        For a file that is cut, no JSON or lacks what is read from it: names it and says `advice`.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_reason(error)}); {advice}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON from line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "no text"
    return f"{error} is missing" if isinstance(error, KeyError) else "it lacks what belongs there"


def check_changes(config: TrainConfig, changes: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """The changes that differ from the run's own settings.

    Raises
    ------
    ValueError
        For one that a run cannot go on with: names the setting and both values.
    """
    new = {name: value for name, value in changes.items() if value != getattr(config, name)}
    fixed = [name for name in new if name not in CHANGEABLE]
    if fixed:
        told = "; ".join(
            f"{name} is {getattr(config, name)!r} in the run, {new[name]!r} here" for name in fixed
        )
        raise ValueError(
            f"{str(run_dir)!r} goes on with its own settings: {told}; remove "
            f"{', '.join(f'--{name}' for name in fixed)}, or start a new run "
            f"(what may change: {', '.join(CHANGEABLE)})"
        )
    return new


def check_unedited(config: TrainConfig, trained: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if `config`, of the file `path`, is not what a checkpoint was trained under.

    `trained` is the configuration in the checkpoint, as JSON.
    """
    now = json.loads(json.dumps(asdict(config)))
    changed = [
        name
        for name, value in trained.items()
        if name in now and name not in _EDITABLE and now[name] != value
    ]
    if changed:
        told = "; ".join(f"{name} was {trained[name]!r} and is now {now[name]!r}" for name in changed)
        raise ValueError(
            f"{path} was changed after the run had started: {told}; set it back, or start a new run with "
            f"--config {path} and another --output_dir"
        )
    for names in (("batch_size", "gradient_accumulation_steps"), ("batch_size", "eval_batches")):
        before, after = (values[names[0]] * values[names[1]] for values in (trained, now))
        if before != after:
            raise ValueError(
                f"{path} was changed after the run had started: {' * '.join(names)} was {before} and is now "
                f"{after}; set it back, or start a new run"
            )
