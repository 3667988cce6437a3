"""The most memory that an accelerator has held."""

from __future__ import annotations

from collections.abc import Callable

import torch


def watch_peak(device: torch.device) -> Callable[[], int | None]:
    """Begin anew; what is returned says the most bytes that tensors have held since then, weights included.

    None where nothing counts them: a CPU's memory belongs to the process, whatever is in it.
    """
    if device.type != "cuda":
        return lambda: None
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device)
