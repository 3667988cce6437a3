"""Everything that can be chosen about growth, in one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from ..geometry import Extrapolator

TriggerName = Literal["geometric", "plateau", "lag", "fixed", "random", "never"]
Placement = Literal["stack", "interleave", "top", "front"]
Initialiser = Literal["geometric", "copy", "zero", "random", "noise"]
Moments = Literal["zero", "copy", "reset"]
LrPolicy = Literal["unchanged", "rewarm_new", "rewarm_all", "restart"]

MIN_SNAPSHOTS = 3
"""Two velocities: with fewer every path is a straight line and there is nothing to measure."""

_POSITIVE = (
    "pg_patience",
    "collect_interval_steps",
    "unfreeze_interval_steps",
    "isolated_lr_scale",
    "rewarm_steps",
    "lag_steps",
    "lag_interval",
    "pg_threshold",
    "tau_crit",
    "kappa_crit",
    "ell_orth",
)
_NOT_NEGATIVE = ("warmup_steps", "isolated_warmup_steps", "noise", "beta0", "gamma0", "eta0")
_GAIN_RANGES = {"beta0": (0.05, 0.5), "gamma0": (0.05, 0.3), "eta0": (0.01, 0.1)}
_SPECTRAL_RANGES = {"k_subspace": (5, 30), "ell_orth": (3, 10)}
_TRIGGER_RANGES = {
    "tau_crit": (1.5, 3.0),
    "kappa_crit": (0.3, 1.0),
    "pg_patience": (3, 10),
    "history_window_size": (5, 15),
}
_WARMUP_RANGE = {"isolated_warmup_steps": (300, 800)}


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """When to grow, where, from what, and what happens right after.

    The defaults are the `report` preset: the reference's documented behaviour (technical report, Algorithms
    1 to 3, and the README where the two differ; docs/growth.md lists the differences).

    Attributes
    ----------
    trigger: what decides; see `aiether.growth.trigger`.
    thresholds: whether `tau_crit` and `kappa_crit` are compared with the raw values or with the normalised
        ones (0 straight line, 1 random walk, whatever the window).
    watch: the layers whose joint trajectory the trigger measures: the frontier layer, or all.
    pg_patience: consecutive evaluations in stagnation that growth needs (Definition 20).
    pg_threshold: growth needs a relative improvement of the best validation loss below this, over the last
        `pg_patience` evaluations against the best before them.
    warmup_steps: optimizer steps before the first check.
    history_window_size: snapshots kept (S).
    collect_interval_steps: optimizer steps between two snapshots.
    growth_fractions: for trigger `fixed`, the fractions of the budget at which the model grows.
    deadline_fractions: for triggers `geometric` and `plateau`, the fractions of the budget at which the model
        grows at the latest, first growth first; empty: it grows when the trigger says so, or never.
    latest_growth: no growth after this fraction of the budget.
    lag_interval: for trigger `lag`, evaluations between two probes.
    lag_steps: optimizer steps that each grown fork of a probe trains.
    lag_candidates: what a probe tries, each "placement/init"; empty: `placement` and `init` alone for trigger
        `lag`, and no probe for other triggers. With a list these choose the form of their growths by a probe.
    dry_run: decide and measure as usual, and never grow; the record then says when each trigger would have.
    placement, grow_by, grow_to: where new layers go and how many; explicit target depths in `grow_to` win.
    max_layers: the planned final depth; None lets `planned_depth` derive it.
    init, noise: the initialiser, and the relative norm of the noise for `noise`.
    beta0 .. escape: the extrapolator's settings (`aiether.geometry.Extrapolator`).
    moments: optimizer moments of new tensors start at zero, are copied from their source, or all are dropped.
    lr_policy: what the learning rate does after a growth: goes on `unchanged`, rises anew for new tensors or
        for all (`rewarm_new`, `rewarm_all`), or its schedule starts again over the steps left (`restart`).
    rewarm_steps: optimizer steps of a re-warm.
    protocol: `report` freezes, warms the new layers up alone, unfreezes and restarts the schedule.
    isolated_warmup_steps, isolated_lr_scale: length of that warm-up and its learning rate factor.
    unfreeze, unfreeze_interval_steps: all at once, or one layer distance per interval, nearest first.
    snapshot_storage: where the trajectory's snapshots lie.
    """

    trigger: TriggerName = "geometric"
    thresholds: Literal["raw", "normalised"] = "raw"
    tau_crit: float = 2.0
    kappa_crit: float = 0.5
    watch: Literal["frontier", "all"] = "frontier"
    pg_patience: int = 5
    pg_threshold: float = 0.15
    warmup_steps: int = 400
    history_window_size: int = 15
    collect_interval_steps: int = 100
    growth_fractions: tuple[float, ...] = (0.2, 0.5)
    deadline_fractions: tuple[float, ...] = ()
    latest_growth: float = 0.8
    lag_interval: int = 5
    lag_steps: int = 20
    lag_candidates: tuple[str, ...] = ()
    dry_run: bool = False
    placement: Placement = "front"
    grow_by: int | Literal["double", "max"] = 1
    grow_to: tuple[int, ...] = ()
    max_layers: int | None = None
    init: Initialiser = "geometric"
    noise: float = 0.2
    beta0: float = 0.1
    gamma0: float = 0.15
    eta0: float = 0.03
    k_subspace: int | Literal["auto"] = 10
    ell_orth: int = 5
    scale: Literal["unit", "displacement"] = "unit"
    center: bool = False
    escape: Literal["modes", "residual"] = "modes"
    moments: Moments = "zero"
    lr_policy: LrPolicy = "unchanged"
    rewarm_steps: int = 100
    protocol: Literal["none", "report"] = "report"
    isolated_warmup_steps: int = 400
    isolated_lr_scale: float = 0.1
    unfreeze: Literal["at_once", "gradual"] = "at_once"
    unfreeze_interval_steps: int = 50
    snapshot_storage: Literal["device", "host", "disk"] = "device"

    def validate(self) -> None:
        """Raise ValueError for the first setting that cannot work, naming what is allowed."""
        self._validate_choices()
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        for name in _NOT_NEGATIVE:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or greater")
        if self.history_window_size < MIN_SNAPSHOTS:
            raise ValueError(
                f"history_window_size is {self.history_window_size}: at least {MIN_SNAPSHOTS} are needed"
            )
        if not 0 < self.latest_growth <= 1:
            raise ValueError(
                f"latest_growth is {self.latest_growth}: a fraction of the budget in (0, 1] is meant"
            )
        if self.protocol == "report" and self.lr_policy != "unchanged":
            raise ValueError(
                f"lr_policy is {self.lr_policy!r}: protocol 'report' has a warm-up and a restart of its own; "
                "choose protocol 'none', or lr_policy 'unchanged'"
            )
        self._validate_fractions()
        self._validate_lag_candidates()
        self._validate_depths()

    def _validate_choices(self) -> None:
        for name, choices in _choices():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        _validate_count("grow_by", self.grow_by, ("double", "max"))
        _validate_count("k_subspace", self.k_subspace, ("auto",))

    def _validate_fractions(self) -> None:
        if self.trigger == "fixed" and not self.growth_fractions:
            raise ValueError(
                "growth_fractions is empty: trigger 'fixed' needs at least one, or use trigger 'never'"
            )
        for name in ("growth_fractions", "deadline_fractions"):
            fractions: tuple[float, ...] = getattr(self, name)
            if any(not 0 < part < 1 for part in fractions) or list(fractions) != sorted(set(fractions)):
                raise ValueError(f"{name} is {fractions}: rising fractions of the budget in (0, 1) are meant")
            used = self.trigger == "fixed" if name == "growth_fractions" else self.deadlines
            if used and fractions[-1] > self.latest_growth:
                raise ValueError(
                    f"{name} ends at {fractions[-1]}, after latest_growth ({self.latest_growth}): "
                    "move the last growth forward or raise latest_growth"
                )

    @property
    def deadlines(self) -> tuple[float, ...]:
        """`deadline_fractions`, for the triggers that keep to them."""
        return self.deadline_fractions if self.trigger in ("geometric", "plateau") else ()

    def _validate_lag_candidates(self) -> None:
        placements, inits = get_args(Placement), get_args(Initialiser)
        for candidate in self.lag_candidates:
            placement, _, init = candidate.partition("/")
            if placement not in placements or init not in inits:
                raise ValueError(
                    f"lag_candidates holds {candidate!r}: a placement ({', '.join(placements)}), a slash and "
                    f"an initialiser ({', '.join(inits)}) are meant, as in stack/copy"
                )
        if len(set(self.lag_candidates)) < len(self.lag_candidates):
            raise ValueError(f"lag_candidates is {' '.join(self.lag_candidates)}: name each candidate once")
        if self.probes and self.protocol == "report" and self.lag_steps > self.isolated_warmup_steps:
            raise ValueError(
                f"lag_steps is {self.lag_steps}, more than isolated_warmup_steps "
                f"({self.isolated_warmup_steps}), within which protocol 'report' tries a "
                "fork: shorten it, or choose protocol 'none'"
            )

    def _validate_depths(self) -> None:
        if any(depth < 1 for depth in self.grow_to) or list(self.grow_to) != sorted(set(self.grow_to)):
            raise ValueError(f"grow_to is {self.grow_to}: rising depths of at least 1 are meant")
        if self.max_layers is not None and self.max_layers < 1:
            raise ValueError(f"max_layers is {self.max_layers}: it must be 1 or more")
        if self.max_layers is not None and self.grow_to and self.grow_to[-1] > self.max_layers:
            raise ValueError(
                f"grow_to ends at {self.grow_to[-1]}, beyond max_layers ({self.max_layers}): raise max_layers"
            )

    def out_of_range(self) -> list[str]:
        """Warnings for values outside the ranges that the reference documents (report, Table 1, and README).

        Its ranges of thresholds are for raw ones: normalised ones are not compared with them.
        """
        ranges: dict[str, tuple[float, float]] = _GAIN_RANGES | _SPECTRAL_RANGES
        if self.thresholds == "raw" and self.trigger == "geometric":
            ranges |= _TRIGGER_RANGES
        if self.protocol == "report":
            ranges |= _WARMUP_RANGE
        return [
            f"{name} is {value}, outside the documented range {low} to {high}"
            for name, (low, high) in ranges.items()
            if not isinstance(value := getattr(self, name), str) and not low <= value <= high
        ]

    def extrapolator(self) -> Extrapolator:
        """The geometric initialiser's extrapolator with these settings.

        The escape term compares with raw tau and kappa (Definition 17) unless the thresholds are normalised.
        """
        return Extrapolator(
            beta0=self.beta0,
            gamma0=self.gamma0,
            eta0=self.eta0,
            k_subspace=self.k_subspace,
            ell_orth=self.ell_orth,
            tau_crit=self.tau_crit,
            kappa_crit=self.kappa_crit,
            thresholds=self.thresholds,
            scale=self.scale,
            center=self.center,
            escape=self.escape,
        )

    def forms(self) -> tuple[tuple[Placement, Initialiser], ...]:
        """(placement, init) of each growth that may be carried out: several where a probe chooses."""
        pairs: Any = [tuple(candidate.split("/")) for candidate in self.lag_candidates]
        return tuple(pairs) or ((self.placement, self.init),)

    @property
    def probes(self) -> bool:
        """Whether a growth is chosen by a probe: forks of the model, each trained a little."""
        return self.trigger == "lag" or (bool(self.lag_candidates) and self.trigger != "never")

    @property
    def extrapolates(self) -> bool:
        """Whether a growth may start from the trajectory, which is then to be kept."""
        return self.trigger != "never" and any(init == "geometric" for _, init in self.forms())

    @property
    def protocol_steps(self) -> int:
        """Steps of the isolated warm-up that follows a growth (0 without the report's protocol)."""
        return self.isolated_warmup_steps if self.protocol == "report" else 0


@cache  # hints are read anew from their text each time, which takes longer than all the rest of a validation
def _choices() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The settings that are one of a few words, and these."""
    choices = {name: get_args(hint) for name, hint in get_type_hints(GrowthConfig).items()}
    return tuple(
        (name, words)
        for name, words in choices.items()
        if words and all(isinstance(word, str) for word in words)
    )


def _validate_count(name: str, value: Any, words: tuple[str, ...]) -> None:
    if value in words or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise ValueError(f"{name} is {value!r}: a whole number from 1, or {' or '.join(map(repr, words))}")
