"""What a path holds: a model folder, a checkpoint of somebody's trainer, of ours, or a distributed one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from transformers import CONFIG_MAPPING

from .._checkpoint import STATE, CheckpointStore
from .._weights import read_mapping
from ._dcp import METADATA, DistributedFolder
from ._tensors import SafetensorsFiles, StoredTensors

CONFIG, TRAINER_STATE, OPTIMIZER = "config.json", "trainer_state.json", "optimizer.pt"
Kind = Literal["model", "trainer", "aiether", "distributed", "file"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on the disk. `step` is None where nothing tells it."""

    path: Path
    kind: Kind
    step: int | None

    @property
    def label(self) -> str:
        """The last part of the path that says something."""
        return self.path.resolve().name

    def tensors(self) -> StoredTensors:
        """The model's tensors; nothing is loaded yet."""
        if self.kind == "file":
            return SafetensorsFiles.of_file(self.path)
        if self.kind == "distributed":
            return DistributedFolder(self.path).model
        return SafetensorsFiles.of_folder(self.path)


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration: as its file has it, and with the defaults that the file leaves out."""

    raw: dict[str, Any]
    full: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a config.json; no code that lies beside it runs.

        Raises
        ------
        ValueError
            If it is missing, damaged, or not what its model type wants.
        """
        if not path.is_file():
            raise ValueError(f"{path} is missing: name the model's configuration with --config FILE")
        raw = read_mapping(path)
        known = raw.get("model_type")
        if not isinstance(known, str) or known not in CONFIG_MAPPING:
            return cls(raw, dict(raw))
        try:
            full = CONFIG_MAPPING[known].from_dict(dict(raw)).to_dict()
        except Exception as error:  # each configuration class validates in its own way
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{path} is no configuration of a {known} model ({reason}): restore it"
            ) from error
        return cls(raw, full)

    def changed_to(self, grown: dict[str, Any]) -> dict[str, Any]:
        """The file's content with what differs between the full configurations changed, and nothing else."""
        return {**self.raw, **{key: value for key, value in grown.items() if self.full.get(key) != value}}


def find_source(path: str | Path) -> Source:
    """What lies at a path: a checkpoint, or the newest one of a run folder of aiether.

    Raises
    ------
    ValueError
        If there is none; names what was looked for.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return Source(path, "file", _number(path.stem))
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder: name a checkpoint's or a model's folder")
    if (path / METADATA).is_file():
        return Source(path, "distributed", _number(path.name))
    if (path / STATE).is_file():
        return Source(path, "aiether", _number(path.name.partition("-stage-")[0]))
    if not (path / CONFIG).is_file() and any((path / name).is_dir() for name in ("checkpoints", "final")):
        return _of_run(path)
    if (path / TRAINER_STATE).is_file():
        step = read_mapping(path / TRAINER_STATE).get("global_step")
        kind: Kind = "trainer" if (path / OPTIMIZER).is_file() else "model"
        return Source(path, kind, step if isinstance(step, int) else None)
    inner = sorted(path.glob("checkpoint-*"), key=lambda folder: _number(folder.name) or 0)
    if inner and not (path / CONFIG).is_file():
        raise ValueError(f"{str(path)!r} holds checkpoints: name one of them, such as {inner[-1]}")
    return Source(path, "model", _number(path.name))


def series(path: str | Path) -> list[Path]:
    """The checkpoints that lie in one folder, of one architecture: a Trainer's output folder, or a run of
    aiether (the snapshots that its newest checkpoint refers to).

    Raises
    ------
    ValueError
        If the folder holds none.
    """
    path = Path(path)
    inner = sorted(path.glob("checkpoint-*"), key=lambda folder: _number(folder.name) or 0)
    if inner:
        return inner
    store = CheckpointStore(path)
    newest = store.latest() if (path / "checkpoints").is_dir() else None
    if newest is None:
        raise ValueError(f"{str(path)!r} holds no series of checkpoints: name at least three of them")
    return sorted(store.snapshots / name for name in newest.read_marker()["snapshots"])


def _of_run(path: Path) -> Source:
    newest = CheckpointStore(path).latest()
    if newest is not None:
        return Source(newest.path, "aiether", newest.step)
    if (path / "final").is_dir():
        return Source(path / "final", "model", None)
    raise ValueError(f"{str(path)!r} holds no complete checkpoint: let the run write one")


def _number(name: str) -> int | None:
    """The number that a name ends with, which is how steps are written: ckpt-1000."""
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else None


def in_order(sources: Sequence[Source]) -> list[Source]:
    """By step where every step is known, else as given.

    Raises
    ------
    ValueError
        If two have the same step.
    """
    steps = [source.step for source in sources]
    if any(step is None for step in steps):
        return list(sources)
    ordered = sorted(sources, key=lambda source: source.step or 0)
    for one, other in pairwise(ordered):
        if one.step == other.step:
            raise ValueError(
                f"{str(one.path)!r} and {str(other.path)!r} are both of step {one.step}: a trajectory needs "
                "different ones"
            )
    return ordered


def intervals(sources: Sequence[Source]) -> list[int] | None:
    """Steps between neighbours; None where a step is not known."""
    steps = [source.step for source in sources if source.step is not None]
    return [later - earlier for earlier, later in pairwise(steps)] if len(steps) == len(sources) else None
