"""Checkpoints that are whole or absent.

A checkpoint is a folder that `from_pretrained` loads, with the rest of the training state beside the
weights: optimizer moments by parameter name (safetensors), everything else as JSON. It is written under a
temporary name, every file is synced, a completion marker that lists the files and the trajectory's snapshots
with their sizes and checksums is written last, and the folder is renamed. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._files import damage, seal, sync_file
from ._weights import is_plain_name

FORMAT = 2
MARKER = "COMPLETE.json"
STATE = "aiether_state.json"
MOMENTS = "moments.safetensors"
_NAME = re.compile(r"step-(\d{8})-stage-(\d{3})$")
_SNAPSHOT = re.compile(r"step-(\d{8})\.safetensors$")
_SEPARATOR = "::"

Moments = dict[str, dict[str, Tensor | int | float | bool]]
"""Optimizer state by parameter name: tensors, and the plain numbers that some optimizers keep."""


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
    pending_probe: dict[str, Any] | None = None  # forks to be tried here: the evaluation that called for them
    pending_evaluation: bool = False  # the evaluation of this step was cut short, and is to be done again
    skips: list[dict[str, Any]] = field(default_factory=list)  # steps whose batch is not used, as events
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

    def read_marker(self) -> dict[str, dict[str, list[int]]]:
        """Size and checksum of every file and snapshot: {"files": {name: [...]}, "snapshots": {...}}."""
        return json.loads((self.path / MARKER).read_text())

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
    """The checkpoints of one run, and the trajectory's snapshots, each written once and shared by them.

    A checkpoint that `newest` found damaged is left where it lies and counts for nothing, until its point is
    reached again or the checkpoints that are kept have passed it.
    """

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        self.directory = directory / "checkpoints"
        self.snapshots = directory / "snapshots"
        self.keep = keep
        self._damaged: dict[Path, str] = {}
        self._sealed: dict[int, list[int]] = {}  # by step: a snapshot's size and checksum

    def complete(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first, as far as the names and sizes of their files tell."""
        return [c for c in self._all() if c.path not in self._damaged and self.damage(c, read=False) is None]

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all as they were written; None if there is none."""
        return self.newest()[0]

    def newest(self) -> tuple[Checkpoint | None, dict[Path, str]]:
        """As `latest`, and what is wrong with each newer checkpoint that had to be skipped."""
        skipped: dict[Path, str] = {}
        for checkpoint in reversed(self._all()):
            reason = self.damage(checkpoint)
            if reason is None:
                return checkpoint, skipped
            skipped[checkpoint.path] = self._damaged[checkpoint.path] = reason
        return None, skipped

    def damage(self, checkpoint: Checkpoint, *, read: bool = True) -> str | None:
        """What is wrong with a checkpoint: a file or snapshot that is missing, cut or changed; else None."""
        path = checkpoint.path
        if not (path / MARKER).is_file():
            return f"{MARKER} is missing, which is written last"
        try:
            marker = checkpoint.read_marker()
            if not all(map(is_plain_name, (*marker["files"], *marker["snapshots"]))):
                return f"{MARKER} names files outside of the checkpoint"
            sealed = [(path / name, sums) for name, sums in marker["files"].items()]
            sealed += [(self.snapshots / name, sums) for name, sums in marker["snapshots"].items()]
            return next(filter(None, (damage(file, sums, read=read) for file, sums in sealed)), None)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return f"{MARKER} cannot be read (damaged, or written by another version of aiether)"

    def has_any(self) -> bool:
        """Whether there is any checkpoint, whole or damaged."""
        return bool(self._all())

    def _all(self) -> list[Checkpoint]:
        found = [
            Checkpoint(path, int(match[1]), int(match[2]))
            for path in (self.directory.iterdir() if self.directory.is_dir() else ())
            if (match := _NAME.match(path.name))
        ]
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.stage))

    def write(
        self,
        *,
        step: int,
        stage: int,
        save_model: Callable[[Path], None],
        moments: Moments,
        record: RunRecord,
    ) -> Checkpoint:
        """Write one checkpoint; on return it is on the disk, and older ones beyond `keep` are gone.

        If it raises (a full disk), no part of it stays, and the checkpoints before it are as they were.
        """
        final = self.directory / f"step-{step:08d}-stage-{stage:03d}"
        temporary = self.directory / f".{final.name}.tmp"
        self._clear_left_over()
        try:
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
            self._finish(temporary, final, record.snapshot_steps)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._rotate()
        return Checkpoint(final, step, stage)

    def _finish(self, temporary: Path, final: Path, snapshot_steps: Iterable[int]) -> None:
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        marker = {
            "files": {str(path.relative_to(temporary)): seal(path) for path in files},
            "snapshots": {_snapshot_name(step): self._sealed[step] for step in snapshot_steps},
        }
        (temporary / MARKER).write_text(json.dumps(marker))
        sync_file(temporary / MARKER)
        sync_file(temporary)
        if final.exists():  # damaged: a complete one would have been resumed from, not written again
            self._remove(final)
        temporary.rename(final)
        sync_file(self.directory)
        self._damaged.pop(final, None)

    def _clear_left_over(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        for left_over in self.directory.glob(".step-*"):
            shutil.rmtree(left_over)
        for half in self.snapshots.glob(".*"):  # of ours, and of safetensors, which has temporary names too
            half.unlink()

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".{path.name}.old")
        path.rename(doomed)  # first out of sight: a kill leaves no half of a checkpoint
        shutil.rmtree(doomed)
        self._damaged.pop(path, None)

    def make_room(self) -> bool:
        """Delete at once what the next `write` would delete at its end; the newest checkpoint always stays.

        Returns whether anything was deleted.
        """
        self._clear_left_over()
        before = len(self._all())
        self._rotate(keep=None if self.keep is None else max(1, self.keep - 1))
        return len(self._all()) < before

    def _rotate(self, keep: int | None = None) -> None:
        keep = keep or self.keep
        kept = self.complete()[-keep:] if keep is not None else self.complete()
        if not kept:
            return
        for checkpoint in self._all():
            if keep is not None and (checkpoint.step, checkpoint.stage) < (kept[0].step, kept[0].stage):
                self._remove(checkpoint.path)
        needed = {name for c in kept for name in c.read_marker()["snapshots"]}
        for path in self.snapshots.iterdir() if self.snapshots.is_dir() else ():
            match = _SNAPSHOT.match(path.name)
            # What is newer than every checkpoint belongs to the one that is being written.
            if match and path.name not in needed and int(match[1]) <= kept[-1].step:
                path.unlink()

    def write_snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the trajectory's snapshot of `step` once; checkpoints then refer to it by its step."""
        self.snapshots.mkdir(parents=True, exist_ok=True)
        final = self.snapshots / _snapshot_name(step)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            self._sealed[step] = seal(temporary)
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)
        sync_file(self.snapshots)

    def adopt(self, checkpoint: Checkpoint) -> set[int]:
        """Let the next checkpoints refer to this one's snapshots; returns their steps."""
        sealed = {int(name[5:13]): sums for name, sums in checkpoint.read_marker()["snapshots"].items()}
        self._sealed |= sealed
        return set(sealed)

    def read_snapshot(self, step: int) -> dict[str, Tensor]:
        with safe_open(self.snapshots / _snapshot_name(step), framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _snapshot_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


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
