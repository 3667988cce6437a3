"""The geometry of a trajectory whose points are checkpoints on the disk, anyone's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiether import __version__
from aiether.geometry import GeometryMetrics, metrics_from_gram, velocity_gram
from aiether.growth.config import MIN_SNAPSHOTS

from ._history import check_alike
from ._sources import Source, find_source, in_order, series
from ._write import Progress

_LAYER = re.compile(r"^((?:[^.]*\.)*?)(\d+)\.")


@dataclass(frozen=True)
class TensorGeometry:
    """One tensor's trajectory."""

    name: str
    shape: tuple[int, ...]
    metrics: GeometryMetrics


@dataclass(frozen=True)
class LayerGeometry:
    """A layer's trajectory: its tensors as one point of the product space. `stack` is its list's path."""

    stack: str
    index: int
    metrics: GeometryMetrics
    tensors: tuple[TensorGeometry, ...]

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.index}" if self.stack else str(self.index)


@dataclass(frozen=True)
class Inspection:
    """What the checkpoints tell.

    Attributes
    ----------
    checkpoints: label and step (None if nothing tells it) of each, oldest first.
    model: all tensors taken together.
    layers: those of numbered blocks, stack by stack.
    others: tensors outside of any numbered block.
    skipped: tensors that are no floating-point numbers.
    """

    checkpoints: tuple[tuple[str, int | None], ...]
    model: GeometryMetrics
    layers: tuple[LayerGeometry, ...]
    others: tuple[TensorGeometry, ...]
    skipped: tuple[str, ...]

    @property
    def intervals(self) -> list[int] | None:
        """Steps between neighbours; None where a step is not known."""
        steps = [step for _, step in self.checkpoints if step is not None]
        return [b - a for a, b in pairwise(steps)] if len(steps) == len(self.checkpoints) else None

    def label(self, layer: LayerGeometry) -> str:
        """`layer 3`, or its whole name where there is more than one stack of layers."""
        return layer.name if len({each.stack for each in self.layers}) > 1 else f"layer {layer.index}"

    def interval_note(self) -> str:
        """At which time scale was measured, in a sentence: the values depend on it."""
        if self.intervals is None:
            return "The checkpoints' steps are not known: they were taken in the order given."
        if len(set(self.intervals)) == 1:
            return f"One checkpoint every {self.intervals[0]:,} steps."
        spans = ", ".join(f"{span:,}" for span in self.intervals)
        return (
            f"The intervals are uneven ({spans} steps): longer ones see more of the noise and less of the "
            "drift, so τ and κ mix time scales. Evenly spaced checkpoints compare better."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "aiether": __version__,
            "checkpoints": [{"name": name, "step": step} for name, step in self.checkpoints],
            "intervals": self.intervals,
            "model": self.model.to_dict(),
            "layers": [
                {"name": layer.name, "stack": layer.stack, "index": layer.index}
                | layer.metrics.to_dict()
                | {"tensors": [_tensor_dict(tensor) for tensor in layer.tensors]}
                for layer in self.layers
            ],
            "others": [_tensor_dict(tensor) for tensor in self.others],
            "skipped": list(self.skipped),
        }


def inspect_checkpoints(paths: Sequence[str | Path], progress: Progress | None = None) -> Inspection:
    """Measure the trajectory through at least three checkpoints of one run.

    They are taken in the order of their steps where all are known (`trainer_state.json`, the name of an
    aiether checkpoint, or a number at the end of the folder's name), else as given. One tensor at a time is
    read, through all checkpoints.

    Parameters
    ----------
    paths
        Model folders, Trainer checkpoints, folders of torch.distributed.checkpoint, aiether's checkpoints, or
        single safetensors files. A single path is a folder that holds the checkpoints: a Trainer's output
        folder, or a run of aiether, whose snapshots are taken.
    progress
        Is told how many bytes of the checkpoints are read, of how many.

    Raises
    ------
    ValueError
        For fewer than three, for checkpoints that do not hold the same tensors in the same shapes, or for
        weights that are not finite.
    """
    if len(paths) == 1:
        paths = series(paths[0])
    if len(paths) < MIN_SNAPSHOTS:
        raise ValueError(
            f"{len(paths)} checkpoint(s) found: at least {MIN_SNAPSHOTS} are needed, since two points always "
            "make a straight line"
        )
    sources = in_order([find_source(path) for path in paths])
    stored = [source.tensors() for source in sources]
    check_alike(sources, stored, sorted(stored[-1]))
    floating = [name for name in stored[-1] if stored[-1].spec(name).dtype.is_floating_point]
    if not floating:
        raise ValueError(
            f"{str(sources[-1].path)!r} holds no floating-point tensors: nothing can be measured"
        )
    total, done = sum(tensors.spec(name).nbytes for tensors in stored for name in floating), 0
    grams: dict[str, Tensor] = {}
    for name in floating:
        grams[name] = velocity_gram([tensors[name] for tensors in stored])
        if not bool(torch.isfinite(grams[name]).all()):
            raise ValueError(f"{_first_infinite(name, sources, stored)}: leave that checkpoint out")
        done += sum(tensors.spec(name).nbytes for tensors in stored)
        if progress:
            progress(done, total)
    shapes = {name: stored[-1].spec(name).shape for name in floating}
    skipped = tuple(name for name in stored[-1] if name not in grams)
    labels = tuple((source.label, source.step) for source in sources)
    return _collect(labels, grams, shapes, skipped)


def _collect(
    checkpoints: tuple[tuple[str, int | None], ...],
    grams: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    skipped: tuple[str, ...],
) -> Inspection:
    tensors = {
        name: TensorGeometry(name, shapes[name], metrics_from_gram(gram)) for name, gram in grams.items()
    }
    blocks: dict[tuple[str, int], list[str]] = {}
    for name in grams:
        if match := _LAYER.match(name):
            blocks.setdefault((match[1].rstrip("."), int(match[2])), []).append(name)
    layers = tuple(
        LayerGeometry(
            stack,
            index,
            metrics_from_gram(torch.stack([grams[name] for name in names]).sum(dim=0)),
            tuple(tensors[name] for name in names),
        )
        for (stack, index), names in sorted(blocks.items())
    )
    return Inspection(
        checkpoints=checkpoints,
        model=metrics_from_gram(torch.stack(list(grams.values())).sum(dim=0)),
        layers=layers,
        others=tuple(tensor for name, tensor in tensors.items() if not _LAYER.match(name)),
        skipped=skipped,
    )


def _first_infinite(name: str, sources: Sequence[Source], stored: Sequence[Any]) -> str:
    for source, tensors in zip(sources, stored, strict=True):
        if not bool(torch.isfinite(tensors[name]).all()):
            return f"{name!r} of {str(source.path)!r} holds NaN or infinite values"
    return f"{name!r} moves too far to be measured"


def _tensor_dict(tensor: TensorGeometry) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape)} | tensor.metrics.to_dict()
