"""The tensors of a grown model, made one block at a time from a checkpoint that stays on the disk."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

from torch import Tensor

from aiether.geometry import History
from aiether.growth import (
    Family,
    GrowthConfig,
    GrowthPlan,
    TrainingState,
    check_depth,
    make_layer,
    origins,
)

from ._tensors import Spec, StoredTensors, Stretch


class GrownTensors(StoredTensors):
    """What `aiether.growth.migrate` would make of a state, in the order of a state dict, made when asked for.

    Read in order it holds one new block at a time; `metrics` then says what was measured for each new tensor.

    Raises
    ------
    ValueError
        If plan, configuration and tensors do not agree on the depth.
    """

    def __init__(
        self,
        state: TrainingState,
        plan: GrowthPlan,
        *,
        family: Family,
        growth: GrowthConfig,
        history: History | None,
        final_depth: int,
        seed: int,
    ) -> None:
        assert isinstance(state.tensors, StoredTensors)
        check_depth(state, plan, family)
        self.state, self.plan, self.family = state, plan, family
        self.growth, self.history = growth, history
        self.final_depth, self.seed = final_depth, seed
        self.metrics: dict[str, dict[str, object]] = {}
        self._old = state.tensors
        self._origins = origins(state.tensors, plan, self.family)
        self._block: tuple[int, dict[str, Tensor]] = (-1, {})

    @property
    def old_nbytes(self) -> int:
        """Bytes of the model that grows."""
        return self._old.nbytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    def __contains__(self, name: object) -> bool:
        return name in self._origins

    def spec(self, name: str) -> Spec:
        return self._old.spec(self._origins[name][0])

    def stretch(self, name: str) -> Stretch | None:
        """Old tensors keep their bytes, which can be copied without being looked at."""
        old, layer = self._origins[name]
        return self._old.stretch(old) if layer is None else None

    def __getitem__(self, name: str) -> Tensor:
        old, layer = self._origins[name]
        return self._old[old] if layer is None else self._made(layer)[name]

    def _made(self, layer: int) -> dict[str, Tensor]:
        if self._block[0] != layer:
            self._block = (-1, {})  # the block before goes first: two would be in memory at once
            _give_memory_back()
            tensors, metrics = make_layer(
                self.state,
                self.plan,
                layer,
                family=self.family,
                growth=self.growth,
                trajectory=self.history,
                final_depth=self.final_depth,
                seed=self.seed,
            )
            self.metrics |= {self.family.name(layer, suffix): entry for suffix, entry in metrics.items()}
            self._block = (layer, {self.family.name(layer, s): tensor for s, tensor in tensors.items()})
        return self._block[1]


def _give_memory_back() -> None:
    """Return freed memory to the system: glibc keeps it, in pieces that the next block may not fit into."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries give back by themselves
        if trim is not None:
            trim(0)
