"""Which kernels attention may take while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave scaled_dot_product_attention its flash and memory-efficient kernels, not cuDNN's, until the end.

    On Hopper torch 2.11 takes cuDNN's first. Their backward pass writes NaN for some lengths with a mask
    (pytorch issue 196678), and runs with a latent block, whose batch becomes smaller on the way, ended in
    launch failures (docs/decisions.md).
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
