"""Checkpoints that are whole or absent.

A checkpoint is a folder that `from_pretrained` loads, with the rest of the training state beside the
weights: optimizer moments by parameter name (safetensors), everything else as JSON. It is written under a
temporary name, every file is synced, a completion marker that lists the files with their sizes is written
last, and the folder is renamed. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
MARKER = "COMPLETE.json"
STATE = "aiether_state.json"
MOMENTS = "moments.safetensors"
_NAME = re.compile(r"step-(\d{8})-stage-(\d{3})$")
_SNAPSHOT = re.compile(r"step-(\d{8})\.safetensors$")
_SEPARATOR = "::"

Moments = dict[str, dict[str, Tensor | int | float | bool]]
"""Optimizer state by parameter name: tensors, and the plain numbers that some optimizers keep."""


def sync_file(path: Path) -> None:
    """Flush a file (or a folder's entries) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    sync_file(temporary)
    temporary.replace(path)
    sync_file(path.parent)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a checkpoint holds besides weights and moments; all of it JSON."""

    total_steps: int
    controller: dict[str, Any]
    train_seconds: float = 0.0
    frozen: list[str] = field(default_factory=list)  # names that the user froze
    scheduler: dict[str, Any] | None = None  # {"restart_step", "state"}
    loss_window: dict[str, float] | None = None  # training loss summed since the last training row
    pending_event: dict[str, Any] | None = None  # a growth whose loss after it is not measured yet
    new_layers: list[int] = field(default_factory=list)
    snapshot_steps: list[int] = field(default_factory=list)
    optimizer: str | None = None  # class of the optimizer that the moments belong to
    optimizer_groups: list[list[str]] | None = None  # names by group of an optimizer that the user built
    observers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. Within one step, the later stage is the grown model."""

    path: Path
    step: int
    stage: int

    def read_record(self) -> RunRecord:
        content = self._read()
        if content["format"] != FORMAT:
            raise ValueError(
                f"checkpoint {str(self.path)!r} has format {content['format']}, this version reads {FORMAT}; "
                "resume with the version of aiether that wrote it"
            )
        return RunRecord(**content["record"])

    def _read(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text())

    def read_moments(self) -> Moments:
        """Optimizer state by parameter name, on the CPU."""
        moments: Moments = self._read()["scalar_moments"]
        with safe_open(self.path / MOMENTS, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                name, entry = key.rsplit(_SEPARATOR, 1)
                moments.setdefault(name, {})[entry] = tensors.get_tensor(key)
        return moments


class CheckpointStore:
    """The checkpoints of one run, and the trajectory's snapshots, each written once and shared by them."""

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        self.directory = directory / "checkpoints"
        self.snapshots = directory / "snapshots"
        self.keep = keep

    def complete(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first; one that lacks its marker or a listed file is left out."""
        found = [
            Checkpoint(path, int(match[1]), int(match[2]))
            for path in (self.directory.iterdir() if self.directory.is_dir() else ())
            if (match := _NAME.match(path.name)) and _is_complete(path)
        ]
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.stage))

    def latest(self) -> Checkpoint | None:
        return max(self.complete(), key=lambda c: (c.step, c.stage), default=None)

    def write(
        self,
        *,
        step: int,
        stage: int,
        save_model: Callable[[Path], None],
        moments: Moments,
        record: RunRecord,
    ) -> Checkpoint:
        """Write one checkpoint; on return it is on the disk, and older ones beyond `keep` are gone."""
        final = self.directory / f"step-{step:08d}-stage-{stage:03d}"
        temporary = self.directory / f".{final.name}.tmp"
        for left_over in self.directory.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
        save_model(temporary)
        flat = {
            f"{name}{_SEPARATOR}{key}": value.detach().contiguous()
            for name, entries in moments.items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
        save_file(flat, temporary / MOMENTS)
        content = {"format": FORMAT, "record": asdict(record), "scalar_moments": _scalars(moments)}
        (temporary / STATE).write_text(json.dumps(content))
        self._finish(temporary, final)
        self._rotate()
        return Checkpoint(final, step, stage)

    def _finish(self, temporary: Path, final: Path) -> None:
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        for path in files:
            sync_file(path)
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
        (temporary / MARKER).write_text(json.dumps(sizes))
        sync_file(temporary / MARKER)
        sync_file(temporary)
        if final.exists():  # damaged: a complete one would have been resumed from, not written again
            shutil.rmtree(final)
        temporary.rename(final)
        sync_file(self.directory)

    def _rotate(self) -> None:
        kept = self.complete()
        if self.keep is not None:
            for checkpoint in kept[: -self.keep]:
                doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.old")
                checkpoint.path.rename(doomed)  # first out of sight: a kill leaves no half of a checkpoint
                shutil.rmtree(doomed)
            kept = kept[-self.keep :]
        needed = {step for c in kept for step in c.read_record().snapshot_steps}
        for path in self.snapshots.iterdir() if self.snapshots.is_dir() else ():
            match = _SNAPSHOT.match(path.name)
            if match and int(match[1]) not in needed:
                path.unlink()

    def write_snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the trajectory's snapshot of `step` once; checkpoints then refer to it by its step."""
        self.snapshots.mkdir(exist_ok=True)
        final = self.snapshots / f"step-{step:08d}.safetensors"
        temporary = final.with_name(f".{final.name}.tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        sync_file(temporary)
        temporary.replace(final)
        sync_file(self.snapshots)

    def read_snapshot(self, step: int) -> dict[str, Tensor]:
        with safe_open(self.snapshots / f"step-{step:08d}.safetensors", framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _is_complete(path: Path) -> bool:
    marker = path / MARKER
    if not marker.is_file():
        return False
    sizes: dict[str, int] = json.loads(marker.read_text())
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items()
    )


def to_json(value: Any) -> Any:
    """Scheduler and controller states as JSON: 0-d tensors become numbers, tuples lists, callables None."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [to_json(entry) for entry in value]
    return None if callable(value) else value


def _scalars(moments: Moments) -> dict[str, dict[str, Any]]:
    scalars = {
        n: {k: v for k, v in entries.items() if not isinstance(v, Tensor)} for n, entries in moments.items()
    }
    return {name: entries for name, entries in scalars.items() if entries}
