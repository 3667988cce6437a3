"""Growth and geometry on checkpoints that lie on a disk, anyone's, whatever their size."""

from __future__ import annotations

from ._write import Progress
from .grow import GrownCheckpoint, grow_checkpoint
from .inspect import Inspection, LayerGeometry, TensorGeometry, inspect_checkpoints

__all__ = [
    "GrownCheckpoint",
    "Inspection",
    "LayerGeometry",
    "Progress",
    "TensorGeometry",
    "grow_checkpoint",
    "inspect_checkpoints",
]
