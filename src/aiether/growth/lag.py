"""Landscape-aware growth: fork the candidates, train each a little, keep the best (arXiv 2406.02469).

The loss right after a growth mispredicts what becomes of it; the loss after a small lag predicts it better.
Here is what needs no model: which candidates there are, how long each trains, and which one wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .config import GrowthConfig
from .plan import PLACEMENTS, GrowthPlan, next_depth
from .trigger import Decision

STAY = "stay"
"""The candidate that does not grow."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to go on: grow by `plan`, or (None) stay as it is."""

    plan: GrowthPlan | None

    @property
    def name(self) -> str:
        return STAY if self.plan is None else f"{self.plan.placement}/{self.plan.init}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a fork.

    Attributes
    ----------
    steps: optimizer steps that it trained.
    flops: training FLOPs that these took.
    seconds: wall-clock, its evaluation included.
    eval_loss: mean validation loss in nats after them; infinite if the fork diverged.
    """

    steps: int
    flops: int
    seconds: float
    eval_loss: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form: a loss that is not finite is None."""
        loss = self.eval_loss if math.isfinite(self.eval_loss) else None
        return {"steps": self.steps, "flops": self.flops, "seconds": self.seconds, "eval_loss": loss}


def candidates(config: GrowthConfig, depth: int, *, final_depth: int) -> tuple[Candidate, ...]:
    """What a probe tries, in the order in which a tie is settled; empty when the model has its final depth.

    Staying is one of them for trigger `lag`, which asks whether to grow at all; under another trigger the
    growth is decided and only its form is open. All that grow reach the same depth.
    """
    to_layers = next_depth(config, depth, final_depth=final_depth)
    if to_layers is None:
        return ()
    grown = tuple(
        Candidate(plan=GrowthPlan(depth, PLACEMENTS[placement](depth, to_layers), init, placement))
        for placement, init in config.forms()
    )
    return (Candidate(plan=None), *grown) if config.trigger == "lag" else grown


def trial_steps(lag_steps: int, flops_per_step: Sequence[int]) -> tuple[int, ...]:
    """How many steps each candidate trains, so that all spend at least what the dearest does in `lag_steps`.

    At equal steps a smaller model would look worse than it is: it had less to spend.
    """
    dearest = lag_steps * max(flops_per_step)
    return tuple(-(-dearest // flops) for flops in flops_per_step)


def verdict(tried: Sequence[Candidate], trials: Sequence[Trial]) -> tuple[str, Decision]:
    """The name of the candidate with the lowest loss, and the decision that follows; ties go to the earlier.

    If no fork has a finite loss, the model stays.
    """
    losses = [trial.eval_loss if math.isfinite(trial.eval_loss) else math.inf for trial in trials]
    told = ", ".join(f"{c.name} {loss:.4g}" for c, loss in zip(tried, losses, strict=True))
    best = losses.index(min(losses))
    if losses[best] == math.inf:
        return STAY, Decision(False, f"no fork has a finite loss ({told})")
    chosen = tried[best]
    said = f"{chosen.name} is best after the lag: validation loss {told}"
    return chosen.name, Decision(chosen.plan is not None, said, chosen.plan)
