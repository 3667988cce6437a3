"""Rotations: of platters against each other, and of tokens around a ring of fixed period."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def turn(pairs_X: Tensor, angle: Tensor | float) -> Tensor:
    """Turn pairs of dimensions (the first half with the second, as transformers pairs them) by an angle."""
    if isinstance(angle, Tensor):
        cos, sin = angle.cos().to(pairs_X.dtype), angle.sin().to(pairs_X.dtype)
    else:
        cos, sin = math.cos(angle), math.sin(angle)
    first, second = pairs_X.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turn_between(query_NY: Tensor, own: int, other: int, platters: int) -> Tensor:
    """A platter's queries as another's keys meet them, where both are turned by their platter's angle."""
    return turn(query_NY, 2 * math.pi * (own - other) / platters)


def ring_turns(num_pairs: int, period: int, base: float = 10000.0) -> Tensor:
    """Turns a period, int64 (pairs,): of angles base^(-m / pairs) a token, rounded to whole numbers.

    A frequency below half a turn a period becomes 0: it cannot come round.
    """
    usual = base ** (-torch.arange(num_pairs, dtype=torch.float64, device="cpu") / num_pairs)  # MPS has none
    return (usual * period / (2 * math.pi)).round().long().to(torch.get_default_device())


def turn_by_place(heads_BHNX: Tensor, places: Tensor, turns: Tensor, period: int) -> Tensor:
    """Turn each token by its place: so many `turns` (X / 2,) a period; places int64, (N,) or (B, N)."""
    angle = (places[..., None] * turns).remainder(period).float() * (2 * math.pi / period)
    return turn(heads_BHNX, angle if places.ndim == 1 else angle[:, None])
