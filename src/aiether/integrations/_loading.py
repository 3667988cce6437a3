"""Batches that go to the device without the host waiting, also after a growth and after a resume."""

from __future__ import annotations

import importlib
from functools import wraps
from typing import Any


def keep_copies_asynchronous() -> None:
    """Let the Trainer's loader keep `non_blocking` when it skips the batches that were trained before.

    accelerate's `skip_first_batches` (1.15) builds a new loader and forgets the setting, so that every stage
    but the first would wait for the device at each batch and leave it idle while the next step is launched.
    The Trainer's reference to that function is replaced once, by one that adds the setting and nothing else.
    """
    trainer_module: Any = importlib.import_module("transformers.trainer")
    original = trainer_module.skip_first_batches
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        rest: Any = original(dataloader, num_batches)
        if hasattr(rest, "_non_blocking"):
            rest._non_blocking = getattr(dataloader, "_non_blocking", False)
        return rest

    trainer_module.skip_first_batches = skip_first_batches
