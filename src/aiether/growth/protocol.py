"""What happens after a growth: which layers train, at which learning rate, and when the schedule restarts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import GrowthConfig
from .plan import GrowthPlan


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The protocol of one growth (Algorithm 2) as a function of the step; pure data.

    A step counts optimizer steps done, as in Trainer's `global_step`: the phase at `step` holds for the next
    one.

    Attributes
    ----------
    start: step of the growth.
    depth: layers of the grown model.
    new_layers: indices of its new layers.
    warmup_end: end of the isolated warm-up, where unfreezing begins and the schedule restarts.
    lr_scale: learning rate factor until then.
    interval: steps between two unfreezings; None when all layers unfreeze at once.
    """

    start: int
    depth: int
    new_layers: tuple[int, ...]
    warmup_end: int
    lr_scale: float
    interval: int | None

    @classmethod
    def after(cls, plan: GrowthPlan, step: int, config: GrowthConfig) -> Phases:
        """The phases that follow `plan` at `step` under the report's protocol."""
        return cls(
            start=step,
            depth=plan.depth_after,
            new_layers=plan.new_layers,
            warmup_end=step + config.isolated_warmup_steps,
            lr_scale=config.isolated_lr_scale,
            interval=config.unfreeze_interval_steps if config.unfreeze == "gradual" else None,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phases:
        return cls(**{**data, "new_layers": tuple(data["new_layers"])})

    @property
    def end(self) -> int:
        """First step from which everything trains."""
        if self.interval is None:
            return self.warmup_end
        furthest = max(self._distance(layer) for layer in range(self.depth))
        return self.warmup_end + max(furthest - 1, 0) * self.interval

    def _distance(self, layer: int) -> int:
        return min(abs(layer - new) for new in self.new_layers)

    def trainable(self, step: int) -> frozenset[int] | None:
        """Layers that train, all else (embeddings, final norm, head too) being frozen; None: everything."""
        if step >= self.end:
            return None
        reach = 0
        if step >= self.warmup_end and self.interval is not None:
            reach = 1 + (step - self.warmup_end) // self.interval
        return frozenset(layer for layer in range(self.depth) if self._distance(layer) <= reach)

    def boundaries(self) -> tuple[int, ...]:
        """Steps at which `trainable` or the learning rate factor changes, rising."""
        if self.interval is None:
            return (self.warmup_end,)
        return tuple(range(self.warmup_end, self.end + 1, self.interval))
