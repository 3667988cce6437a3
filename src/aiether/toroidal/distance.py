"""Distance on a ring of fixed period, and how a product of queries and keys can carry it.

A distance in cosines is a sum of products of what each token knows of its own place: cos(a - b) = cos a cos b
+ sin a sin b. As further dimensions of queries and keys it needs no bias of one entry a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .settings import Distance

_HARMONICS = (1, 3, 5, 7)


def ring_distance(steps: Tensor, period: int, kind: Distance) -> Tensor:
    """Distance between tokens that are so many steps apart, float32 of the same shape, from 0 to 1/2."""
    if kind == "triangle":
        wrapped = steps.remainder(period)
        return torch.minimum(wrapped, period - wrapped).float() / period
    return _in_float64(_distance_in_cosines, steps, period, kind)


def _distance_in_cosines(steps: Tensor, period: int, kind: Distance) -> Tensor:
    angle = steps.remainder(period).double() * (2 * math.pi / period)
    weights = cosine_weights(kind)
    return (0.25 - torch.stack([weight * (n * angle).cos() for n, weight in weights]).sum(0)).float()


def cosine_weights(kind: Distance) -> list[tuple[int, float]]:
    """(n, weight): the distance is 1/4 less the sum of weight cos(n 2 pi d / P).

    The chord has one term. The triangle's series is 2/pi^2 sum over odd n of cos(n x) / n^2.
    """
    if kind == "chordal":
        return [(1, 0.25)]
    return [(n, 2 / (math.pi * n) ** 2) for n in _HARMONICS]


def ring_waves(places: Tensor, period: int, kind: Distance) -> Tensor:
    """cos and sin of each harmonic at each place, float32 (..., 2 harmonics), computed in float64."""
    return _in_float64(_waves, places, period, kind)


def _waves(places: Tensor, period: int, kind: Distance) -> Tensor:
    angle = places.remainder(period).double()[..., None] * (2 * math.pi / period)
    order = _orders(kind, places.device)
    return torch.cat([(angle * order).cos(), (angle * order).sin()], dim=-1).float()


def _holds_float64(device: torch.device) -> bool:
    return device.type != "mps"


def _in_float64(
    compute: Callable[[Tensor, int, Distance], Tensor], places: Tensor, period: int, kind: Distance
) -> Tensor:
    """What `compute` finds; where a device lacks float64, by a table of one period from the CPU."""
    if _holds_float64(places.device):
        return compute(places, period, kind)
    table = compute(torch.arange(period, device="cpu"), period, kind).to(places.device)
    return table[places.remainder(period)]


def wave_weights(kind: Distance, device: torch.device) -> Tensor:
    """What the product of two tokens' `ring_waves` is weighted by, float32 (2 harmonics,)."""
    weights = [torch.full((1,), weight, device=device) for _, weight in cosine_weights(kind)]
    return torch.cat(weights * 2)


def _orders(kind: Distance, device: torch.device) -> Tensor:
    """The n of each cosine, odd numbers, float64; made on the device, which nothing then waits for."""
    return torch.arange(1, 2 * len(cosine_weights(kind)), 2, device=device, dtype=torch.float64)


def shuffled_places(places: Tensor, period: int, sinks: int) -> Tensor:
    """Places in a random order around the ring, always the same one; sinks stay where they are.

    The others are a period further on, so that none is taken for a sink.
    """
    order = torch.randperm(period, generator=torch.Generator().manual_seed(period)).to(places.device)
    return torch.where(places < sinks, places, order[places.remainder(period)] + period)


def platter_distance(platters: int, device: torch.device) -> Tensor:
    """Distance between platters, which lie on a ring too, float32 (D, D): min(|k - l|, D - |k - l|) / D."""
    index = torch.arange(platters, device=device)
    apart = (index[:, None] - index).abs()
    return torch.minimum(apart, platters - apart).float() / platters


def in_ring_window(steps: Tensor, period: int, window: int) -> Tensor:
    """Whether tokens so many steps apart lie within `window` of each other around the ring, bool."""
    wrapped = steps.remainder(period)
    return torch.minimum(wrapped, period - wrapped) <= window
