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
def quiet_about_tied_weights() -> Iterator[None]:
    """The Trainer warns of "missing keys" for a tied head, which is saved under one name only."""
    logger = logging.getLogger("transformers.trainer")
    message = "There were missing keys in the checkpoint model loaded: ['lm_head.weight']"

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(message)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
