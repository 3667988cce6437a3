"""The one stateful object of growth: it watches, decides, carries a growth out and keeps the record.

Everything it knows can be written down (`state_dict`) and restored exactly (`load_state_dict`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..geometry import GeometryMetrics, Trajectory, metrics_from_gram
from .config import MIN_SNAPSHOTS, GrowthConfig
from .families import Family, block_tensors
from .lag import Candidate, Trial, candidates, verdict
from .lineage import Lineage
from .lr_policy import LrFactors, lr_factors
from .migrate import Migration, TrainingState, migrate
from .plan import GrowthPlan, frontier, plan_growth
from .protocol import Phases
from .trigger import Decision, Observation, TriggerState, decide

_STATE_VERSION = 1


class GrowthController:
    """Growth for one run.

    A driver calls, after each optimizer step, `snapshot` where `wants_snapshot` says so; `evaluate` once for
    each evaluation; and `grow` with the plan of a decision to grow. Between growths it follows `trainable`,
    `lr_factors`, `restart_step` and `next_phase_step`. Where a decision says `probe`, the driver tries
    `candidates` on forks of the model and takes the decision that `settle` draws from the outcome.

    Parameters
    ----------
    config: what to do; validated here.
    family: how the model names its blocks.
    depth: layers at the start of the run.
    total_steps: optimizer steps of the whole budget.
    seed: the run's seed.
    final_depth: most layers the model may have (see `planned_depth`).
    directory: where snapshots lie for `snapshot_storage="disk"`.
    """

    def __init__(
        self,
        config: GrowthConfig,
        family: Family,
        *,
        depth: int,
        total_steps: int,
        seed: int,
        final_depth: int,
        directory: Path | None = None,
    ) -> None:
        config.validate()
        if final_depth < depth:
            raise ValueError(f"final_depth is {final_depth}, the model starts with {depth} layers: raise it")
        self.config = config
        self.family = family
        self.total_steps = total_steps
        self.seed = seed
        self.final_depth = final_depth
        self.lineage = Lineage.start(depth)
        self._start_depth = depth
        self.trigger_state = self._fresh_trigger_state()
        self.last_metrics: dict[str, Any] = _row(None, 0, 0)
        self._phases: tuple[Phases, ...] = ()
        self._directory = directory
        self.trajectory = self._empty_trajectory()

    def _fresh_trigger_state(self) -> TriggerState:
        return TriggerState.start(
            self.config,
            depth=self._start_depth,
            final_depth=self.final_depth,
            total_steps=self.total_steps,
            seed=self.seed,
        )

    def _empty_trajectory(self) -> Trajectory:
        return Trajectory(self.config.history_window_size, self.config.snapshot_storage, self._directory)

    @property
    def depth(self) -> int:
        return self.lineage.depth

    @property
    def num_growths(self) -> int:
        return self.trigger_state.num_growths

    @property
    def frozen_until(self) -> int:
        """First step from which everything trains: no growth comes before it."""
        return self._phases[-1].end if self._phases else 0

    def replan(self, total_steps: int) -> None:
        """The budget is of another number of steps from now on: growths still to come by the clock move."""
        self.total_steps = total_steps
        due = self._fresh_trigger_state().due_steps
        self.trigger_state = replace(self.trigger_state, due_steps=due)

    # Watching

    def _scope(self) -> frozenset[int]:
        """Layers whose joint trajectory is measured."""
        if self.config.watch == "all":
            return frozenset(range(self.depth))
        return frozenset({frontier(self.config.placement, self.depth)})

    def watched_layers(self) -> frozenset[int]:
        """Layers whose tensors are snapshotted: the trigger's, and the sources of the next geometric growth.

        The geometric trigger goes on measuring at the final depth, for the record.
        """
        measures = self.config.trigger == "geometric" or self.config.dry_run
        watched = self._scope() if measures else frozenset()
        if self.config.extrapolates:
            plans = (candidate.plan for candidate in self.candidates())
            watched |= {s for p in plans if p and p.init == "geometric" for s in p.sources}
        return watched

    def candidates(self) -> tuple[Candidate, ...]:
        """The ways to go on that a probe would try now; empty at the final depth."""
        return candidates(self.config, self.depth, final_depth=self.final_depth)

    def _next_plan(self) -> GrowthPlan | None:
        return plan_growth(self.config, self.depth, final_depth=self.final_depth)

    def wants_snapshot(self, step: int) -> bool:
        """Whether `snapshot` should be called at this step.

        Not while layers are frozen: Algorithm 2 stands outside the loop that collects, and a history of
        frozen steps would measure the protocol.
        """
        if step % self.config.collect_interval_steps or self.trainable(step) is not None:
            return False
        return bool(self.watched_layers())

    def snapshot(self, step: int, named_parameters: Mapping[str, Tensor]) -> None:
        """Append the watched blocks' tensors to the trajectory (copies).

        Raises
        ------
        ValueError
            If a watched layer has no tensors in `named_parameters`.
        """
        blocks = block_tensors(named_parameters, self.family)
        watched = sorted(self.watched_layers())
        missing = [layer for layer in watched if layer not in blocks]
        if missing:
            raise ValueError(
                f"layers {missing} are watched and not among the parameters (blocks found: {list(blocks)}): "
                f"pass the unwrapped model's named_parameters(), with blocks under {self.family.blocks!r}"
            )
        names = [name for layer in watched for name in blocks[layer].values()]
        self.trajectory.append({name: named_parameters[name] for name in names}, step)

    def _measure(self) -> GeometryMetrics | None:
        """Geometry of the watched layers as one point of the product space (Definition 1): Grams add up."""
        if len(self.trajectory) < MIN_SNAPSHOTS:
            return None
        blocks = block_tensors(self.trajectory.names, self.family)
        if not self._scope() <= blocks.keys():
            return None
        names = [name for layer in sorted(self._scope()) for name in blocks[layer].values()]
        return metrics_from_gram(self.trajectory.gram(names))

    # Deciding

    def wants_evaluation(self, step: int) -> bool:
        """Whether a growth by the clock falls on this step, so that it need not wait for an evaluation."""
        due = self.trigger_state.next_due_step
        if due is None or self._next_plan() is None:
            return False
        return step == max(due, self.frozen_until)

    def evaluate(self, step: int, eval_loss: float, depth: int | None = None) -> Decision:
        """Take note of an evaluation and decide; call it once for each evaluation.

        Parameters
        ----------
        step: optimizer steps done.
        eval_loss: mean validation loss in nats.
        depth: the model's layers, as a check that model and controller agree.
        """
        if depth is not None and depth != self.depth:
            raise ValueError(
                f"the model has {depth} layers, the controller counts {self.depth}: "
                "carry growths out with the controller's grow"
            )
        metrics = self._measure()
        if self.trainable(step) is not None:
            decision = Decision(False, f"layers are frozen until step {self.frozen_until} (growth protocol)")
        else:
            self.trigger_state, decision = decide(
                self.config, self.trigger_state, self._observe(step, eval_loss, metrics)
            )
        self.last_metrics = _row(metrics, self.trigger_state.stagnation, len(self.trajectory))
        if not decision.grow:
            return decision
        if self.config.trigger == "lag":
            return Decision(False, decision.reason, probe=True)
        if self.config.dry_run:
            return _only_said(decision)
        if self.config.probes:
            return Decision(False, decision.reason, probe=True)
        return replace(decision, plan=self._next_plan())

    def settle(self, tried: Sequence[Candidate], trials: Sequence[Trial]) -> tuple[str, Decision]:
        """What a probe has decided: the winner's name, and the decision (none to grow in a dry run)."""
        name, decision = verdict(tried, trials)
        return name, _only_said(decision) if self.config.dry_run and decision.grow else decision

    def _observe(self, step: int, eval_loss: float, metrics: GeometryMetrics | None) -> Observation:
        return Observation(
            step=step,
            total_steps=self.total_steps,
            depth=self.depth,
            final_depth=self.final_depth,
            eval_loss=eval_loss,
            metrics=metrics,
            num_snapshots=len(self.trajectory),
        )

    # Growing

    def grow(self, state: TrainingState, plan: GrowthPlan) -> Migration:
        """Migrate `state` by `plan` and begin the next stage: history empty, counters zero, lineage longer.

        If the migration raises, the controller is unchanged.
        """
        migration = self.preview(state, plan)
        self._advance(plan, state.step)
        self.trajectory.clear()
        return migration

    def undo_growth(self, before: GrowthController) -> None:
        """Be what `before`, a copy made before `grow`, is; the snapshots are gone."""
        self.lineage, self.trigger_state, self._phases = before.lineage, before.trigger_state, before._phases

    def preview(self, state: TrainingState, plan: GrowthPlan) -> Migration:
        """What `grow` would make of `state`; the controller stays as it is."""
        return migrate(
            state,
            plan,
            growth=self.config,
            trajectory=self.trajectory,
            final_depth=self.final_depth,
            seed=self.seed,
        )

    def _advance(self, plan: GrowthPlan, step: int) -> None:
        self.lineage = self.lineage.grow(plan, step)
        self.trigger_state = self.trigger_state.after_growth(step)
        if self.config.protocol == "report":
            self._phases = (*self._phases, Phases.after(plan, step, self.config))

    def fork(self, plan: GrowthPlan | None, step: int) -> GrowthController:
        """A controller for a fork of the model that grew by `plan` at `step` (None: did not grow).

        It follows the protocol and the learning rate as the run's own would, and has no history: the run's
        snapshots are neither shared nor copied.
        """
        other = copy.copy(self)
        other.trajectory = Trajectory(self.config.history_window_size)
        if plan is not None:
            other._advance(plan, step)
        return other

    # The protocol after a growth

    def _current(self, step: int) -> Phases | None:
        """The phases of the last growth at or before `step`."""
        return next((phases for phases in reversed(self._phases) if phases.start <= step), None)

    def trainable(self, step: int) -> frozenset[int] | None:
        """Layers that train in the step after `step`; all else is frozen. None: the whole model trains."""
        phases = self._current(step)
        return phases.trainable(step) if phases else None

    def lr_scale(self, step: int) -> float:
        """Factor on the schedule's learning rate in the step after `step`."""
        phases = self._current(step)
        return phases.lr_scale if phases and step < phases.warmup_end else 1.0

    def lr_factors(self, step: int) -> LrFactors:
        """Factors on the schedule's learning rate in the step after `step`: protocol and policy together."""
        scale, grown = self.lr_scale(step), self._last_growth(step)
        if grown is None:
            return LrFactors(scale, scale)
        factors = lr_factors(self.config.lr_policy, step - grown, self.config.rewarm_steps)
        return LrFactors(new=scale * factors.new, old=scale * factors.old)

    def _last_growth(self, step: int) -> int | None:
        return max((grown for grown in self.trigger_state.growth_steps if grown <= step), default=None)

    def newest_layers(self) -> tuple[int, ...]:
        """Indices of the layers that the last growth made; empty before the first one."""
        if not self.trigger_state.growth_steps:
            return ()
        last = self.trigger_state.growth_steps[-1]
        return tuple(
            index
            for index, record in enumerate(self.lineage.records)
            if record.parent is not None and record.born_step == last
        )

    def restart_step(self, step: int) -> int | None:
        """The last step, at or before `step`, at which the schedule restarted; None: never yet."""
        if self.config.lr_policy == "restart":
            return self._last_growth(step)
        return max((phases.warmup_end for phases in self._phases if phases.warmup_end <= step), default=None)

    def next_phase_step(self, step: int) -> int | None:
        """The next step after `step` at which the trainable set or the learning rate factor changes."""
        later = [boundary for phases in self._phases for boundary in phases.boundaries() if boundary > step]
        return min(later, default=None)

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything but the snapshots themselves (`trajectory.snapshot_items(step)` gives those)."""
        return {
            "version": _STATE_VERSION,
            "lineage": self.lineage.to_dict(),
            "trigger": self.trigger_state.to_dict(),
            "phases": [asdict(phases) for phases in self._phases],
            "last_metrics": dict(self.last_metrics),
            "trajectory": self.trajectory.state_dict(),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        read_snapshot: Callable[[int], Mapping[str, Tensor]],
        device: torch.device | str | None = None,
    ) -> None:
        """Restore exactly what `state_dict` wrote; it may have been through JSON.

        Parameters
        ----------
        state: what `state_dict` returned.
        read_snapshot: gives the tensors of the snapshot taken at a step.
        device: where snapshots shall lie with `snapshot_storage="device"`: the model's; default: where
            `read_snapshot` puts them.

        Raises
        ------
        ValueError
            For a state of another version, or of a run with another window.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the growth state has version {state.get('version')!r}, this aiether reads "
                f"{_STATE_VERSION}: resume with the version that wrote it"
            )
        window = state["trajectory"]["window_size"]
        if window != self.config.history_window_size:
            raise ValueError(
                f"the growth state's window holds {window} snapshots, history_window_size is "
                f"{self.config.history_window_size}: resume with the configuration of the first start"
            )
        self.lineage = Lineage.from_dict(state["lineage"])
        self.trigger_state = TriggerState.from_dict(state["trigger"])
        self._phases = tuple(Phases.from_dict(phases) for phases in state["phases"])
        self.last_metrics = dict(state["last_metrics"])
        self.trajectory = Trajectory.from_state(
            state["trajectory"],
            read_snapshot,
            storage=self.config.snapshot_storage,
            directory=self._directory,
            device=device,
        )


def _only_said(decision: Decision) -> Decision:
    return Decision(False, f"dry run: the model would grow now ({decision.reason})")


def _row(metrics: GeometryMetrics | None, stagnation: int, num_snapshots: int) -> dict[str, Any]:
    """The geometry fields of an evaluation's line in metrics.jsonl; None where nothing is measured yet."""
    measured = metrics.to_dict() if metrics else dict.fromkeys(GeometryMetrics.__dataclass_fields__)
    return {**measured, "stagnation": stagnation, "num_snapshots": num_snapshots}
