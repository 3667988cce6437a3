"""Growth and geometry on checkpoints that lie on a disk, anyone's, whatever their size."""

from __future__ import annotations

from .grow import GrownCheckpoint, grow_checkpoint

__all__ = ["GrownCheckpoint", "grow_checkpoint"]
