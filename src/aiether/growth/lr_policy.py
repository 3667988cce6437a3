"""What the learning rate does after a growth: pure functions of the steps since then."""

from __future__ import annotations

from dataclasses import dataclass

from .config import LrPolicy


@dataclass(frozen=True)
class LrFactors:
    """Factors on the schedule's learning rate: for tensors of new layers, and for all others."""

    new: float = 1.0
    old: float = 1.0


def lr_factors(policy: LrPolicy, steps_since: int, rewarm_steps: int) -> LrFactors:
    """The factors of the next optimizer step, `steps_since` steps after a growth.

    A re-warm rises linearly, from 1/`rewarm_steps` in the first step to 1 in step `rewarm_steps`. `unchanged`
    leaves the schedule alone; so does `restart`, which is the schedule's own matter.
    """
    rising = min(1.0, (steps_since + 1) / rewarm_steps)
    match policy:
        case "rewarm_new":
            return LrFactors(new=rising)
        case "rewarm_all":
            return LrFactors(new=rising, old=rising)
        case "unchanged" | "restart":
            return LrFactors()
