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
    distinct, which = np.unique(keys, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError(
            f"the data holds {len(distinct)} different document(s); at least 2 are needed, one to train "
            "on and one to validate on; give more text"
        )
    weights = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(weights, which, sizes)
    target = fraction * float(weights.sum())
    chosen: list[int] = []
    taken = 0
    for index, weight in enumerate(weights.tolist()):
        if taken >= 0.9 * target:
            break
        if taken + weight <= target:
            chosen.append(index)
            taken += weight
    return distinct[chosen] if chosen else distinct[[int(weights.argmin())]]
