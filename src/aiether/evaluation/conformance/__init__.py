"""Does a causal language model do what one must? Asked of its logits and gradients, for any architecture."""

from __future__ import annotations

from aiether.evaluation.conformance._report import Check, ConformanceReport
from aiether.evaluation.conformance.kit import CHECKS, check_conformance

__all__ = ["CHECKS", "Check", "ConformanceReport", "check_conformance"]
