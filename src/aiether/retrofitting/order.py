"""The order in which a loop sees its windows: new in every epoch, and a function of the batch's number."""

from __future__ import annotations

from functools import lru_cache

import torch


def shuffled(number: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Which of `count` windows make up batch `number`; epoch e is ordered by `seed` + e."""
    places = (divmod(index, count) for index in range(number * batch_size, (number + 1) * batch_size))
    return [_order(count, seed + epoch)[at] for epoch, at in places]


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
