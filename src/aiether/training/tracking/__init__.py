"""A run's rows in TensorBoard, Weights & Biases or trackio, beside its own files, which stay the truth."""

from __future__ import annotations

from ._open import TRACKERS, check_trackers
from ._tracking import TrackedRun, Tracking

__all__ = ["TRACKERS", "TrackedRun", "Tracking", "check_trackers"]
