"""What a history of tensors has to offer, wherever its snapshots lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor


class History(Protocol):
    """The snapshots of named tensors, oldest first: a `Trajectory`, or checkpoints on a disk."""

    def __len__(self) -> int:
        """Number of snapshots."""
        ...

    @property
    def names(self) -> Collection[str]: ...

    def snapshots(self, name: str) -> Sequence[Tensor]:
        """The snapshots of one tensor, in its shape and dtype."""
        ...

    def gram(self, names: str) -> Tensor:
        """The Gram matrix of its velocities, (S-1, S-1) float64 on the CPU."""
        ...
