"""A dry run on a record: when would each trigger have fired, and which thresholds would have meant when.

A trigger is a pure decision on what each evaluation shows, so it can be asked again about a run that is over.
The answer holds up to the first growth that it would have made: after that the record is of another model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..geometry import GeometryMetrics
from .config import GrowthConfig, TriggerName
from .trigger import TRIGGERS, Observation, TriggerState, decide, watched_values

_METRICS = tuple(field.name for field in fields(GeometryMetrics))


@dataclass(frozen=True)
class Stretch:
    """The evaluations of a run at one depth; steps count from the start of the run.

    `first_depth` is the run's own at its start (None: this one), `growth_steps` are its growths up to here.
    """

    depth: int
    steps: tuple[int, ...]
    eval_losses: tuple[float, ...]
    metrics: tuple[GeometryMetrics | None, ...]
    first_depth: int | None = None
    growth_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Firing:
    """What a trigger would have done: the step of its first growth (None: none), and why (or why not yet).

    `asked` is False for a trigger that a record cannot answer for.
    """

    trigger: TriggerName
    step: int | None
    reason: str
    asked: bool = True


@dataclass(frozen=True)
class Thresholds:
    """A calibration: the thresholds that lie at a quantile of a history, and when they would have fired."""

    quantile: float
    tau_crit: float
    kappa_crit: float
    firing: Firing


def stretches(rows: Iterable[Mapping[str, Any]]) -> list[Stretch]:
    """Group the evaluation rows of a `metrics.jsonl` by depth, in their order; other rows are passed over."""
    result: list[Stretch] = []
    for row in rows:
        if row.get("eval_loss") is None:
            continue
        measured = None
        if all(row.get(name) is not None for name in _METRICS):
            measured = GeometryMetrics(**{name: row[name] for name in _METRICS})
        if not result or result[-1].depth != row["depth"]:
            first = result[0].depth if result else None
            grown = (*result[-1].growth_steps, result[-1].steps[-1]) if result else ()
            result.append(Stretch(int(row["depth"]), (), (), (), first, grown))
        last = result[-1]
        result[-1] = replace(
            last,
            steps=(*last.steps, int(row["step"])),
            eval_losses=(*last.eval_losses, float(row["eval_loss"])),
            metrics=(*last.metrics, measured),
        )
    return result


def first_firing(
    config: GrowthConfig, stretch: Stretch, *, total_steps: int, final_depth: int, seed: int
) -> Firing:
    """When `config`'s trigger would first have grown the model of this stretch.

    Parameters
    ----------
    total_steps, final_depth, seed: of the run, as its controller had them.
    """
    if config.trigger == "lag":
        return Firing("lag", None, "cannot be asked from a record: it trains forks of the model", asked=False)
    first_depth = stretch.first_depth or stretch.depth
    state = TriggerState.start(
        config, depth=first_depth, final_depth=final_depth, total_steps=total_steps, seed=seed
    )
    state = replace(state, growth_steps=stretch.growth_steps)
    reason = "the record holds no evaluation at this depth"
    for step, loss, measured in zip(stretch.steps, stretch.eval_losses, stretch.metrics, strict=True):
        seen = Observation(
            step=step,
            total_steps=total_steps,
            depth=stretch.depth,
            final_depth=final_depth,
            eval_loss=loss,
            metrics=measured,
            num_snapshots=measured.num_snapshots if measured else 0,
        )
        state, decision = decide(config, state, seen)
        reason = decision.reason
        if decision.grow:
            return Firing(config.trigger, step, reason)
    return Firing(config.trigger, None, reason)


def every_firing(
    config: GrowthConfig, stretch: Stretch, *, total_steps: int, final_depth: int, seed: int
) -> list[Firing]:
    """`first_firing` of every trigger under otherwise the same settings."""
    return [
        first_firing(
            replace(config, trigger=name),
            stretch,
            total_steps=total_steps,
            final_depth=final_depth,
            seed=seed,
        )
        for name in TRIGGERS
        if name != "never"
    ]


def calibrate(
    config: GrowthConfig,
    stretch: Stretch,
    quantiles: Sequence[float],
    *,
    total_steps: int,
    final_depth: int,
    seed: int,
) -> list[Thresholds]:
    """Thresholds from a run's own history: tau and kappa at each quantile, raw or normalised as in `config`.

    Both rise with training, so a quantile is about the share of the stretch after which they hold.

    Raises
    ------
    ValueError
        If the stretch holds no geometry, or a quantile lies outside [0, 1].
    """
    wrong = [quantile for quantile in quantiles if not 0 <= quantile <= 1]
    if wrong:
        raise ValueError(f"quantiles lie in 0 to 1, not {wrong}")
    values = [watched_values(config, measured) for measured in stretch.metrics if measured is not None]
    if not values:
        raise ValueError(
            f"no evaluation with {stretch.depth} layers measured the geometry: record a run with "
            "--trigger geometric, or with --dry_run true, which watches and never grows"
        )
    result = []
    for quantile in quantiles:
        tau, kappa = (float(value) for value in np.quantile(np.array(values), quantile, axis=0))
        fitted = replace(config, trigger="geometric", tau_crit=tau, kappa_crit=kappa)
        firing = first_firing(fitted, stretch, total_steps=total_steps, final_depth=final_depth, seed=seed)
        result.append(Thresholds(quantile, tau, kappa, firing))
    return result
