"""Which documents are held out for validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]


def validation_keys(keys: Keys, sizes: npt.NDArray[Any], fraction: float) -> Keys:
    """The content keys (sorted) whose documents make up the validation side.

    Documents are taken in the order of their content's hash, each that still fits, until nine tenths of
    `fraction` of the bytes are reached; if none fits, the smallest. A key stands for all documents of
    equal content, so none of them can lie on the other side.

    Args:
        keys: content hash of each document, (N,).
        sizes: bytes of each document, (N,).
        fraction: share of the bytes to hold out.

    Raises ValueError when fewer than two different documents exist.
    """
    if not len(keys) or keys.min() == keys.max():
        raise ValueError(
            f"the data holds {min(1, len(keys))} different document(s); at least 2 are needed, one to train "
            "on and one to validate on; give more text"
        )
    target = fraction * float(sizes.sum())
    # Hashes are uniform: below four times the share of their range lies, almost always, all that is taken.
    # Looking there first keeps memory small where documents are many; the result is the same.
    near = keys < np.uint64(min(4.0 * fraction, 0.999) * 2.0**64)
    chosen, full = _first_that_fit(keys[near], sizes[near], target)
    if not full:
        chosen, _ = _first_that_fit(keys, sizes, target)
    if len(chosen):
        return chosen
    distinct, weights = _distinct(keys, sizes)
    return distinct[[int(weights.argmin())]]


def _first_that_fit(keys: Keys, sizes: npt.NDArray[Any], target: float) -> tuple[Keys, bool]:
    """Keys taken in their order while they fit, and whether nine tenths of `target` were reached."""
    distinct, weights = _distinct(keys, sizes)
    chosen: list[int] = []
    taken = 0
    for index, weight in enumerate(weights.tolist()):
        if taken >= 0.9 * target:
            break
        if taken + weight <= target:
            chosen.append(index)
            taken += weight
    return distinct[chosen], taken >= 0.9 * target


def _distinct(keys: Keys, sizes: npt.NDArray[Any]) -> tuple[Keys, npt.NDArray[np.int64]]:
    """Each key once, sorted, and the bytes of all documents that have it."""
    distinct, which = np.unique(keys, return_inverse=True)
    weights = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(weights, which, sizes)
    return distinct, weights
