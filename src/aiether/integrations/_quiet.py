"""What transformers would say that has no news for the user."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bar for reading or writing a checkpoint, which takes a moment and happens often."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_about_names_on_disk() -> Iterator[None]:
    """The Trainer compares a checkpoint's names with the model's, and warns where they differ by design.

    A tied head is saved under one name, and some families under other names than the model's (Mixtral's
    experts). By then `from_pretrained`, which knows both, has read the weights and warned of lost ones.
    """
    logger = logging.getLogger("transformers.trainer")
    messages = tuple(f"There were {kind} keys in the checkpoint model" for kind in ("missing", "unexpected"))

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(messages)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
