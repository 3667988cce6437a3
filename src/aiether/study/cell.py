"""One run of a study in this process: started, resumed or already there."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from aiether.training.config import TrainConfig

from .warm import Warmth

SUMMARY = "summary.json"
_HEAVY = ("checkpoints", "final", "layers", "snapshots", "window", "state")

Status = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a run went; `reason` says why it failed."""

    status: Status
    reason: str | None = None


def run_cell(
    folder: Path, settings: Mapping[str, Any], *, keep_models: bool, warmth: Warmth | None = None
) -> Outcome:
    """Train a run to its end in `folder`, going on with what is there; all that it says goes to its log.

    `settings` are a `TrainConfig`'s fields. Without `keep_models` the weights go once the records are whole.
    `warmth` knows what this process has compiled before.
    """
    from aiether.training import run as job

    if is_finished(folder):
        drop_weights(folder, keep_models)
        return Outcome("finished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    given = dict(settings)
    retrofit, base = given.pop("retrofit", None), given.pop("retrofit_base", None)
    config = replace(TrainConfig(**with_tuples(given)), output_dir=str(folder))
    with _log(folder):
        try:
            if retrofit is not None:
                return _retrofitted(folder, config, retrofit, Path(base), keep_models)
            (warmth or Warmth()).warm_up(config, folder.parent)
            begun = (folder / "config.yaml").is_file()
            result = job.resume(folder, report=False) if begun else job.train(config, report=False)
        except KeyboardInterrupt:
            return Outcome("interrupted")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this run's failure and is reported
            traceback.print_exc()
            return Outcome("failed", " ".join(f"{type(error).__name__}: {error}".split()))
    if result.status == "finished":
        drop_weights(folder, keep_models)
    return Outcome(result.status)


def base_of(study_dir: Path) -> Path:
    """Where a study of retrofitted models keeps the model that it begins with."""
    return study_dir.resolve() / "base" / "final"


def _retrofitted(
    folder: Path, config: TrainConfig, given: Mapping[str, Any], base: Path, keep_model: bool
) -> Outcome:
    from aiether.retrofitting.arm import run_arm

    run_arm(folder, config, given, base, keep_model=keep_model)
    drop_weights(folder, keep_model)
    return Outcome("finished")


def is_finished(folder: Path) -> bool:
    """Whether a run has ended and its records are whole."""
    path = folder / SUMMARY
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def _log(folder: Path) -> Iterator[None]:
    """Beside the run folder, which must be new or a run's when training begins."""
    path = folder.with_name(f"{folder.name}.log")
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def drop_weights(folder: Path, keep_models: bool) -> None:
    """Take away what only going on would need, once the records are whole."""
    for name in () if keep_models else _HEAVY:
        shutil.rmtree(folder / name, ignore_errors=True)


def with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that went through JSON, lists as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
