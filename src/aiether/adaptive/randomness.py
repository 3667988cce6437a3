"""Random numbers that are a function of where they are used: no generator is shared with anything.

Routing controls and sampled exits draw from here: dropout, data order and initialisation keep their own
numbers whatever an arm of a comparison routes, a recomputed forward pass (gradient checkpointing) draws the
same ones, and a cached decode draws those of the full forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK, _POSITIVE = 0xFFFFFFFF, 0x7FFFFFFF


def hashed_uniform(positions_BT: Tensor, salt: int, count: Tensor | None = None) -> Tensor:
    """Numbers in [0, 1), float32 of shape (B, T), from each token's position.

    Args:
        positions_BT: int64 positions.
        salt: tells users of the numbers apart (a layer's index, an iteration).
        count: int64 scalar, how many training passes there were: then rows differ too, and from pass to pass.
            None: the same numbers for every row, always.
    """
    # Ranges and constants meet in an exclusive or first: compiled kernels hold a range in 32 bits, where sums
    # and products with large constants do not fit.
    bits = positions_BT ^ ((salt + 1) * 0x9E3779B1 & _POSITIVE)
    if count is not None:
        rows = torch.arange(len(positions_BT), device=positions_BT.device)[:, None] ^ 0x2545F491
        bits = bits + _mixed(rows + (count + 1) * 0xC2B2AE3D)
    return (_mixed(bits) >> 8).float() / float(1 << 24)


def _mixed(bits: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): a bijection of words, held here in int64."""
    bits = bits & _MASK
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)
