"""How a run under `fit` ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `checkpoint` is the newest complete one; pass it as `resume` to go on.

    `signal` names the signal that interrupted it, as in "SIGTERM".
    """

    status: Literal["finished", "interrupted"]
    step: int
    depth: int
    num_growths: int
    train_seconds: float
    checkpoint: Path
    model: PreTrainedModel
    signal: str | None = None
