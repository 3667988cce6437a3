"""The distance on the ring as further dimensions of queries and keys, for kernels that take no bias."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distance import ring_waves, wave_weights
from .settings import Distance, ToroidalSettings

if TYPE_CHECKING:
    from .attention import Places


_MANY = 32
"""Queries of which waves are worth keeping."""


@dataclass(frozen=True)
class _Ring:
    """What the waves depend on. Those that compare equal have equal places, though other tensors."""

    known_by: Hashable
    num_queries: int
    num_keys: int
    kind: Distance
    period: int
    sinks: int
    shuffled: bool
    scale: float
    dtype: torch.dtype
    device: torch.device
    query: Tensor = field(compare=False)
    key: Tensor = field(compare=False)


def waves_of(
    settings: ToroidalSettings, places: Places, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What queries ask, float32 (1 or B, N, W), times lambda; and what keys tell, `dtype` (1 or B, M, V).

    What is asked goes through `in_halves`, as what is told did. Kept where the places are known by a name.
    """
    kind: Distance = "chordal" if settings.distance == "chordal" else "harmonics"
    ring = _Ring(
        places.known_by, places.query.shape[-1], places.key.shape[-1], kind, settings.period, settings.sinks,
        settings.shuffled, scale, dtype, places.key.device, places.query, places.key,
    )  # fmt: skip
    return _kept_waves(ring) if _can_be_kept(places) else _waves(ring)


def _can_be_kept(places: Places) -> bool:
    """Not of few queries, as in decoding, where each step has others; nor what stands for numbers to come."""
    if torch.compiler.is_compiling():  # asked first: the compiler has to leave its graph for a stream's state
        return False
    if places.known_by is None or places.query.shape[-1] < _MANY or type(places.key) is not Tensor:
        return False
    return not (places.key.is_cuda and torch.cuda.is_current_stream_capturing())


@lru_cache(maxsize=16)
def _kept_waves(ring: _Ring) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(mode=False), torch.no_grad():
        return _waves(ring)


def _waves(ring: _Ring) -> tuple[Tensor, Tensor]:
    """A sink's distance is 0 where the others' is 1/4 less their cosines.

    A constant a query may have, so sinks get lambda / 4 more and the others their cosines.
    """
    query, key = (each if each.ndim == 2 else each[None] for each in (ring.query, ring.key))
    sink = (key < ring.sinks)[..., None]
    told = torch.cat([ring_waves(key, ring.period, ring.kind) * ~sink, sink.float()], dim=-1)
    waves = ring_waves(query, ring.period, ring.kind) * wave_weights(ring.kind, key.device) / ring.scale
    asked = torch.cat([waves, torch.full_like(waves[..., :1], 0.25 / ring.scale)], dim=-1)
    return asked, in_halves(told, ring.dtype, (0, 1, 0))


def in_halves(exact: Tensor, dtype: torch.dtype, order: tuple[int, int, int]) -> Tensor:
    """In `dtype`; in half precision as rounded numbers (0) and what they lack (1): neighbours would be equal.

    The product of one in the order (0, 0, 1) with one in the order (0, 1, 0) lacks that of the two rests.
    """
    if dtype in (torch.float32, torch.float64):
        return exact.to(dtype)
    high = exact.to(dtype)
    parts = (high, (exact - high.float()).to(dtype))
    return torch.cat([parts[each] for each in order], -1)
