"""When to grow: pure decisions on what an evaluation shows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..geometry import GeometryMetrics
from .config import MIN_SNAPSHOTS, GrowthConfig, TriggerName
from .plan import GrowthPlan, depth_schedule, next_depth, planned_depth


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one evaluation shows.

    Attributes
    ----------
    step, total_steps: optimizer steps so far, and of the whole budget.
    depth, final_depth: layers now, and at most.
    eval_loss: mean validation loss in nats.
    metrics: geometry of the watched layers; None while the window holds fewer than three snapshots.
    num_snapshots: snapshots in the window.
    """

    step: int
    total_steps: int
    depth: int
    final_depth: int
    eval_loss: float
    metrics: GeometryMetrics | None = None
    num_snapshots: int = 0


@dataclass(frozen=True, kw_only=True)
class TriggerState:
    """What a trigger remembers between evaluations; JSON-able.

    Attributes
    ----------
    stagnation: consecutive evaluations in stagnation (Definition 20).
    eval_losses: finite validation losses since the last growth.
    growth_steps: steps of the growths so far.
    due_steps: steps at which growths are due, one each, for triggers that go by the clock, or at the latest
        (`deadline_fractions`); else empty.
    """

    stagnation: int = 0
    eval_losses: tuple[float, ...] = ()
    growth_steps: tuple[int, ...] = ()
    due_steps: tuple[int, ...] = ()

    @classmethod
    def start(
        cls, config: GrowthConfig, *, depth: int, final_depth: int, total_steps: int, seed: int
    ) -> TriggerState:
        """The state before training: times by the clock, drawn ones too, never change after."""
        num_growths = len(depth_schedule(config, depth, final_depth=final_depth))
        if config.trigger == "random":
            return cls(due_steps=draw_steps(config, num_growths, total_steps, seed))
        fractions = config.growth_fractions if config.trigger == "fixed" else config.deadlines
        return cls(due_steps=tuple(_step_at(fraction, total_steps) for fraction in fractions)[:num_growths])

    @property
    def num_growths(self) -> int:
        return len(self.growth_steps)

    @property
    def next_due_step(self) -> int | None:
        """Step of the next growth by the clock, if there is one."""
        return self.due_steps[self.num_growths] if self.num_growths < len(self.due_steps) else None

    def after_growth(self, step: int) -> TriggerState:
        """Counters and losses start again: they belong to the smaller model."""
        return replace(self, stagnation=0, eval_losses=(), growth_steps=(*self.growth_steps, step))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TriggerState:
        return cls(
            stagnation=data["stagnation"],
            eval_losses=tuple(data["eval_losses"]),
            growth_steps=tuple(data["growth_steps"]),
            due_steps=tuple(data["due_steps"]),
        )


@dataclass(frozen=True)
class Decision:
    """Whether to grow now, why or why not, and (from the controller) the plan.

    `probe`: whether and how is to be found out first, on forks of the model.
    """

    grow: bool
    reason: str
    plan: GrowthPlan | None = None
    probe: bool = False


Trigger = Callable[[GrowthConfig, TriggerState, Observation], tuple[TriggerState, Decision]]


def decide(config: GrowthConfig, state: TriggerState, obs: Observation) -> tuple[TriggerState, Decision]:
    """The trigger's verdict on one evaluation, within the limits that hold for every trigger.

    Call it once for each evaluation outside the protocol's frozen phases. A loss that is not finite never
    grows the model and resets the counter.
    """
    if not math.isfinite(obs.eval_loss):
        return replace(state, stagnation=0), Decision(
            False, f"validation loss is {obs.eval_loss}: never grows on that"
        )
    state = replace(state, eval_losses=(*state.eval_losses, float(obs.eval_loss)))
    state, decision = TRIGGERS[config.trigger](config, state, obs)
    due = state.next_due_step
    if config.deadlines and not decision.grow and due is not None and obs.step >= due:
        decision = Decision(True, f"due at the latest at step {due} (deadline_fractions); {decision.reason}")
    if decision.grow and (limit := _limit(config, obs)):
        return state, Decision(False, f"{limit} ({decision.reason})")
    return state, decision


def _limit(config: GrowthConfig, obs: Observation) -> str | None:
    if not depth_schedule(config, obs.depth, final_depth=obs.final_depth):
        return f"has its final depth of {obs.depth} layers"
    if obs.step > _step_at(config.latest_growth, obs.total_steps):
        return f"too late: past {config.latest_growth:.0%} of {obs.total_steps} steps (latest_growth)"
    if obs.step >= obs.total_steps:
        return "too late: no step is left to train new layers"
    if config.probes and obs.step + _longest_trial(config, obs) >= obs.total_steps:
        return f"too late: a probe of {config.lag_steps} steps would outlast the run (lag_steps)"
    if config.protocol_steps and obs.step + config.protocol_steps >= obs.total_steps:
        return (
            f"too late: {config.protocol_steps} steps of isolated warm-up would not end before the run does"
        )
    return None


def _longest_trial(config: GrowthConfig, obs: Observation) -> int:
    """Most steps that a fork of a probe may train: staying costs less a step, and gets more of them."""
    to_layers = next_depth(config, obs.depth, final_depth=obs.final_depth)
    assert to_layers is not None
    return math.ceil(config.lag_steps * to_layers / obs.depth)


def _step_at(fraction: float, total_steps: int) -> int:
    """The last step within a fraction of the budget (0.29 of 100 is 29, though 0.29 * 100 < 29)."""
    return math.floor(fraction * total_steps + 1e-6)


def growth_warnings(config: GrowthConfig, *, total_steps: int, depth: int | None = None) -> list[str]:
    """What the budget rules out, in words: said before the run, not found out after it.

    Parameters
    ----------
    total_steps: optimizer steps of the whole budget.
    depth: of the model at the start; None leaves out what depends on it.
    """
    if config.trigger == "never":
        return []
    if depth is not None and (short := _too_few_fractions(config, depth)):
        return [short]
    history = MIN_SNAPSHOTS * config.collect_interval_steps
    first = {
        "geometric": max(config.warmup_steps, history),
        "plateau": config.warmup_steps,
        "lag": config.warmup_steps,
        "fixed": _step_at(config.growth_fractions[0], total_steps) if config.growth_fractions else 0,
        "random": min(config.warmup_steps, _step_at(config.latest_growth, total_steps)),
    }[config.trigger]
    if config.deadlines:
        first = min(first, _step_at(config.deadlines[0], total_steps))
    last = _step_at(config.latest_growth, total_steps)
    if config.protocol_steps:
        last = min(last, total_steps - config.protocol_steps - 1)
    if first > last:
        return [
            f"the model cannot grow in {total_steps} steps: the first growth could be at step {first}, "
            f"{f'the last at {last}' if last > 0 else 'and its warm-up would outlast the run'}; "
            "train longer, or lower warmup_steps, collect_interval_steps or isolated_warmup_steps"
        ]
    if config.extrapolates and first < history:
        return [
            f"a growth at step {first} would find fewer than {MIN_SNAPSHOTS} snapshots (one every "
            f"{config.collect_interval_steps} steps) and copy: lower collect_interval_steps"
        ]
    return []


def _too_few_fractions(config: GrowthConfig, depth: int) -> str | None:
    """Fixed times lead to the planned depth only if there are as many as growths."""
    if config.trigger != "fixed" or config.max_layers is None:
        return None
    depths = depth_schedule(config, depth, final_depth=planned_depth(config, depth))
    growths = len(config.growth_fractions)
    if len(depths) <= growths:
        return None
    return (
        f"growth_fractions names {growths} time(s), at which {depth} layers become {depths[growths - 1]}, "
        f"not the planned {depths[-1]}: give {len(depths)} fractions, or the depths by grow_to"
    )


def relative_improvement(eval_losses: tuple[float, ...], patience: int) -> float | None:
    """Best of the last `patience` losses against the best before them, relative to the latter.

    None while there is nothing before them. Negative when the recent ones are worse.
    """
    if len(eval_losses) <= patience:
        return None
    before, recent = min(eval_losses[:-patience]), min(eval_losses[-patience:])
    return (before - recent) / max(abs(before), 1e-12)


def _loss_verdict(config: GrowthConfig, state: TriggerState) -> Decision:
    improvement = relative_improvement(state.eval_losses, config.pg_patience)
    if improvement is None:
        have = len(state.eval_losses)
        return Decision(
            False, f"{have} evaluations since the last growth, {config.pg_patience + 1} are needed"
        )
    change = f"best validation loss improved by {improvement:.2%} over {config.pg_patience} evaluations"
    if improvement < config.pg_threshold:
        return Decision(True, f"{change}, less than {config.pg_threshold:.2%}")
    return Decision(False, f"{change}, still {config.pg_threshold:.2%} or more")


def _warming_up(config: GrowthConfig, obs: Observation) -> Decision | None:
    if obs.step < config.warmup_steps:
        return Decision(False, f"no check before step {config.warmup_steps} (warmup_steps)")
    return None


def _geometric(config: GrowthConfig, state: TriggerState, obs: Observation) -> tuple[TriggerState, Decision]:
    if early := _warming_up(config, obs):
        return replace(state, stagnation=0), early
    if obs.metrics is None:
        have = f"{obs.num_snapshots} snapshots in the window, {MIN_SNAPSHOTS} are needed"
        return replace(state, stagnation=0), Decision(False, have)
    tau, kappa = watched_values(config, obs.metrics)
    stagnant = tau >= config.tau_crit and kappa >= config.kappa_crit
    state = replace(state, stagnation=state.stagnation + 1 if stagnant else 0)
    word = "normalised " if config.thresholds == "normalised" else ""
    measured = (
        f"{word}tau {tau:.3g} (threshold {config.tau_crit:g}), kappa {kappa:.3g} ({config.kappa_crit:g}), "
        f"{state.stagnation} of {config.pg_patience} evaluations in stagnation"
    )
    if state.stagnation < config.pg_patience:
        return state, Decision(False, measured)
    loss = _loss_verdict(config, state)
    return state, Decision(loss.grow, f"{measured}; {loss.reason}")


def watched_values(config: GrowthConfig, metrics: GeometryMetrics) -> tuple[float, float]:
    """The tau and kappa that the thresholds are compared with: raw or normalised."""
    if config.thresholds == "normalised":
        return metrics.tau_normalised, metrics.kappa_normalised
    return metrics.tau, metrics.kappa


def _plateau(config: GrowthConfig, state: TriggerState, obs: Observation) -> tuple[TriggerState, Decision]:
    return state, _warming_up(config, obs) or _loss_verdict(config, state)


def _lag(config: GrowthConfig, state: TriggerState, obs: Observation) -> tuple[TriggerState, Decision]:
    """When to ask; the answer is the probe's (`aiether.growth.lag`)."""
    if early := _warming_up(config, obs):
        return state, early
    since = len(state.eval_losses)
    if since % config.lag_interval:
        due = since + config.lag_interval - since % config.lag_interval
        return state, Decision(
            False, f"{since} evaluations since the last growth, a probe is due after {due}"
        )
    return state, Decision(True, f"a probe was due after {since} evaluations since the last growth")


def draw_steps(config: GrowthConfig, count: int, total_steps: int, seed: int) -> tuple[int, ...]:
    """`count` rising steps, uniform from `warmup_steps` to the latest growth, drawn from the seed."""
    latest = _step_at(config.latest_growth, total_steps)
    draw = random.Random(f"growth steps:{seed}")
    return tuple(sorted(int(draw.uniform(min(config.warmup_steps, latest), latest)) for _ in range(count)))


def _scheduled(config: GrowthConfig, state: TriggerState, obs: Observation) -> tuple[TriggerState, Decision]:
    total, due = len(state.due_steps), state.next_due_step
    if due is None:
        return state, Decision(False, f"all {total} growths of the schedule are done")
    number = f"growth {state.num_growths + 1} of {total}"
    if obs.step >= due:
        return state, Decision(True, f"{number} was due at step {due}")
    return state, Decision(False, f"{number} is due at step {due}")


def _never(config: GrowthConfig, state: TriggerState, obs: Observation) -> tuple[TriggerState, Decision]:
    return state, Decision(False, "trigger is 'never'")


TRIGGERS: dict[TriggerName, Trigger] = {
    "geometric": _geometric,
    "plateau": _plateau,
    "lag": _lag,
    "fixed": _scheduled,
    "random": _scheduled,
    "never": _never,
}
"""Registry: (config, state, observation) -> (state, decision)."""
