"""The settings of runs that take seconds: a model of one layer that grows to two at a fixed time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TINY_RUN: dict[str, Any] = {
    "n_layer": 1,
    "max_layers": 2,
    "n_head": 2,
    "n_embd": 16,
    "context_length": 16,
    "vocab_size": 300,
    "trigger": "fixed",
    "growth_fractions": [0.5],
    "device": "cpu",
}
"""Without what a test is about: steps and intervals, batches, data."""


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The words of a command line."""
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
