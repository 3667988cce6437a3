"""What a run's clock is not to count: the compiling of its blocks, at its start and after each growth."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from aiether.data import prepare
from aiether.training.config import TrainConfig
from aiether.training.length import course_of
from aiether.training.stopwatch import seconds_per_step

_SHAPE = ("arch", "n_embd", "n_head", "context_length", "vocab_size", "batch_size", "dropout", "bf16")


class Warmth:
    """What this process has compiled already.

    Compiled blocks are shared by all models of a shape. Other shapes count towards the limit after which
    torch compiles no more, so they are forgotten.
    """

    def __init__(self) -> None:
        self._shape: tuple[object, ...] | None = None
        self._warm: set[TrainConfig] = set()

    def warm_up(self, config: TrainConfig, place: Path) -> None:
        """Walk a model that is thrown away through every depth of a run, once for runs that are alike.

        `place` is a folder to work in. A run on a budget of seconds does that by itself.
        """
        if not config.compile:
            return
        shape = tuple(getattr(config, name) for name in _SHAPE)
        if self._shape not in (None, shape):
            torch._dynamo.reset()
            self._warm.clear()
        self._shape = shape
        length = {"max_steps": 1, "max_tokens": None, "max_flops": None, "max_seconds": None}
        alike = replace(config, seed=0, lr=1e-3, output_dir=None, **length)
        if config.max_seconds is None and alike not in self._warm:
            # A folder of its own: another process may be at the same beside this one.
            with tempfile.TemporaryDirectory(prefix=".warm-", dir=place) as own:
                seconds_per_step(config, prepare(config), course_of(config).depths, Path(own))
            self._warm.add(alike)
