"""What a submitted job does: one run, and a word on how it ended.

Nothing here imports torch before the number of threads is set.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any


def run_order(folder: str, settings: Mapping[str, Any], keep_models: bool, threads: int, word: str) -> None:
    """Train a run, or go on with it, and write to the file `word` how it ended.

    `word` holds {"status", "reason", "further"}, the last of which is whether it saved a new checkpoint.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit lets it pass by
    signal.signal(_warning(), _stop)
    from aiether.integrations import CheckpointStore, raise_interrupts, write_json

    from .cell import run_cell

    store = CheckpointStore(Path(folder))
    before = store.latest()
    with raise_interrupts():
        outcome = run_cell(Path(folder), settings, keep_models=keep_models)
    write_json(Path(word), {**asdict(outcome), "further": store.latest() != before})


def _warning() -> signal.Signals:
    """The signal that comes some time before a job's time is over."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def _stop(number: int, frame: FrameType | None) -> None:
    """As SIGTERM, which has a run save: submitit would raise in the middle of a step."""
    signal.signal(number, signal.SIG_IGN)
    signal.raise_signal(signal.SIGTERM)
