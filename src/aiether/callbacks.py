"""The reference's `ProceduralGrowthCallback`, under its documented import path and with its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from aiether.growth import GrowthConfig
from aiether.integrations import GrowthCallback

STRATEGIES = {"GeometricExtrapolator": "geometric"}
"""The reference names its initialiser by a class; aiether's own names are accepted too."""

__all__ = ["ProceduralGrowthCallback"]


class ProceduralGrowthCallback(GrowthCallback):
    """Growth on a Hugging Face Trainer, configured as the reference documents it.

    Under `aiether.fit(trainer)` it works whole. In a bare `trainer.train()` it stops at the first growth,
    writes the grown checkpoint and says how to go on, since a callback cannot swap a Trainer's model.

    Parameters
    ----------
    patience
        Consecutive evaluations in stagnation before a growth (`pg_patience`).
    threshold
        Relative improvement of the validation loss below which growth is allowed (`pg_threshold`).
    strategy
        "GeometricExtrapolator", or one of aiether's initialisers.
    warmup_steps
        Steps before the first stagnation check.
    growth_params
        Any other field of `aiether.growth.GrowthConfig`: beta0, gamma0, eta0, k_subspace, ell_orth,
        tau_crit, placement, max_layers and so on. What is not given is the `report` preset's.

    Raises
    ------
    ValueError
        For an unknown strategy or parameter, or a value that cannot work.
    """

    def __init__(
        self,
        patience: int = 5,
        threshold: float = 0.15,
        strategy: str = "GeometricExtrapolator",
        warmup_steps: int = 400,
        growth_params: Mapping[str, Any] | None = None,
    ) -> None:
        given = dict(growth_params or {})
        known = {field.name for field in fields(GrowthConfig)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"growth_params has no {unknown[0]!r}; known are {', '.join(sorted(known))}")
        named = {"pg_patience": patience, "pg_threshold": threshold, "warmup_steps": warmup_steps}
        settings = {"init": STRATEGIES.get(strategy, strategy), **named, **given}
        super().__init__(GrowthConfig(**settings))
