"""Every test process computes on one thread: tiny models gain nothing from more, workers lose."""

from __future__ import annotations

import gc

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Every stage of a Trainer collects garbage: half a second, if it looks through all that imports made."""
    gc.freeze()
