"""A callback that carries a growth configuration to `fit`."""

from __future__ import annotations

from transformers import TrainerCallback

from aiether.growth import GrowthConfig


class GrowthCallback(TrainerCallback):
    """Carries `growth` among a Trainer's callbacks; `aiether.fit(trainer)` takes it from there."""

    def __init__(self, growth: GrowthConfig) -> None:
        self.growth = growth
