"""A trajectory whose snapshots are checkpoints on the disk, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from aiether.geometry import velocity_gram

from ._sources import Source
from ._tensors import StoredTensors


class StoredHistory:
    """A `History` over the tensors `names` of checkpoints, oldest first. Nothing is kept in memory.

    Raises
    ------
    ValueError
        If a checkpoint lacks one of the tensors or holds it in another shape.
    """

    def __init__(
        self, sources: Sequence[Source], stored: Sequence[StoredTensors], names: Iterable[str]
    ) -> None:
        self._stored = list(stored)
        self.names = frozenset(names)
        check_alike(sources, stored, sorted(self.names))

    def __len__(self) -> int:
        return len(self._stored)

    def snapshots(self, name: str) -> list[Tensor]:
        return [tensors[name] for tensors in self._stored]

    def gram(self, names: str) -> Tensor:
        return velocity_gram(self.snapshots(names))


def check_alike(
    sources: Sequence[Source],
    stored: Sequence[StoredTensors],
    names: Sequence[str],
) -> None:
    """Raise ValueError unless all checkpoints hold `names` in the shapes that the last one has.

    Nothing but a single file may hold more or less than the last one: a shallower model is another function.
    """
    *earlier, last = stored
    for source, tensors in zip(sources, earlier, strict=False):
        wanted = names if source.kind == "file" else last
        missing = [name for name in wanted if name not in tensors]
        more = [name for name in tensors if name not in last] if source.kind != "file" else []
        if missing or more:
            lacking, having = (sources[-1], source) if more else (source, sources[-1])
            raise ValueError(
                f"{str(lacking.path)!r} lacks {len(more or missing)} tensors that {str(having.path)!r} has, "
                f"such as {(more or missing)[0]!r}: a trajectory needs checkpoints of one architecture and "
                "depth"
            )
        for name in names:
            if tensors.spec(name).shape != last.spec(name).shape:
                raise ValueError(
                    f"{name!r} is {tensors.spec(name).shape} in {str(source.path)!r} and "
                    f"{last.spec(name).shape} in {str(sources[-1].path)!r}: a trajectory needs checkpoints "
                    "of one architecture"
                )
