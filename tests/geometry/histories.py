"""Seeded histories of every kind, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KINDS = ("walk", "straight", "return", "still", "spectrum", "decaying")


def history(kind: str, shape: tuple[int, ...], num_snapshots: int, seed: int, rank: int = 4) -> Tensor:
    """(S, *shape) float64 snapshots of the given kind."""
    rng = np.random.default_rng(seed)
    count, size = num_snapshots - 1, int(np.prod(shape, dtype=int))
    start = rng.standard_normal(size)
    if kind == "walk":
        velocity = rng.standard_normal((count, size))
    elif kind == "straight":
        velocity = rng.uniform(0.5, 2.0, (count, 1)) * rng.standard_normal(size)
    elif kind == "still":
        velocity = np.zeros((count, size))
    elif kind == "decaying":  # what training looks like: a drift that slows down, under noise
        velocity = rng.standard_normal(size) * 0.8 ** np.arange(count)[:, None]
        velocity += 0.3 * rng.standard_normal((count, size))
    elif kind == "spectrum":
        velocity = with_spectrum(0.75 ** np.arange(min(rank, count, size)), count, size, rng)
    else:
        velocity = rng.integers(-8, 9, (count, size)).astype(float)  # whole numbers: the sum below is exact
        velocity[-1] = -velocity[:-1].sum(axis=0)
        start = np.round(start)
    points = np.concatenate([start[None], start + np.cumsum(velocity, axis=0)])
    return torch.from_numpy(points.reshape(num_snapshots, *shape))


def with_spectrum(values: np.ndarray, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A (count, size) matrix with these singular values and random singular vectors."""
    left = np.linalg.qr(rng.standard_normal((count, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((size, len(values))))[0]
    return (left * values) @ right.T
