"""Made-up tasks, seeded, with known answers: a pass key in a long text, and sequences that repeat."""

from __future__ import annotations

from aiether.evaluation.tasks.passkey import (
    Passkey,
    PasskeyCell,
    Wording,
    id_wording,
    make_passkeys,
    score_passkeys,
    text_wording,
)
from aiether.evaluation.tasks.periodic import losses_by_period, periodic_windows, split_periods

__all__ = [
    "Passkey",
    "PasskeyCell",
    "Wording",
    "id_wording",
    "losses_by_period",
    "make_passkeys",
    "periodic_windows",
    "score_passkeys",
    "split_periods",
    "text_wording",
]
