"""What an arm of a study of retrofitted models does to the study's own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from aiether.toroidal import ToroidalSettings
from aiether.training.config import TrainConfig

from .config import TuneConfig

Variant = Literal["torus", "adapters", "untouched", "identity", "random_swap"]
_FROM_TRAINING = ("steps", "transfer_steps", "batch_size", "accumulation", "lr", "bf16", "seed")
"""Of the tuning: given by the study's base, budget and seed."""


@dataclass(frozen=True)
class ArmSettings:
    """What a condition's `retrofit` says; fields of `ToroidalSettings` and `TuneConfig` stand beside these.

    Attributes
    ----------
    variant: `torus`; or a control: `adapters`, the same tuning without a torus; `untouched`, none at all;
        `identity`, converted and left at progress 0; `random_swap`, as the reference did it: attention of the
        layers with random weights, on the torus from the first step.
    layers: which; None: all, or those that are suggested.
    suggest_layers: so many, those whose conversion costs this model least (see `suggest.py`).
    transfer: share of the steps that are layer-wise transfer.
    train_size: windows that are tuned on, over and over; None: all there are.
    dataset_path: what is tuned on, one source or several as in `DataConfig`; None: the study's text. The
        evaluation is on the study's in any case.
    """

    variant: Variant = "torus"
    layers: tuple[int, ...] | None = None
    suggest_layers: int | None = None
    transfer: float = 0.33
    train_size: int | None = None
    dataset_path: str | tuple[str, ...] | None = None
    settings: ToroidalSettings = field(default_factory=ToroidalSettings)
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def check_layers(self, depth: int) -> None:
        """Raises ValueError if a model of `depth` layers has not the ones that are named or asked for."""
        if self.suggest_layers is not None and self.layers is not None:
            raise ValueError(
                f"layers is {list(self.layers)} and suggest_layers {self.suggest_layers}: give one of the "
                "two, with layers: null for the other"
            )
        if self.suggest_layers is not None and not 1 <= self.suggest_layers <= depth:
            raise ValueError(f"suggest_layers is {self.suggest_layers}: choose from 1 to {depth}")
        if any(not 0 <= layer < depth for layer in self.layers or ()):
            raise ValueError(f"layers is {list(self.layers or ())}: from 0 to {depth - 1}")

    def flops_per_token(self, config: TrainConfig) -> int:
        """Forward and backward FLOPs of a token in attention that the torus adds: D^2 pairs for one.

        As in `aiether.evaluation.flops_per_token` both products over the full square count; the few
        dimensions that hold distances do not.
        """
        if self.variant in ("adapters", "untouched", "identity"):
            return 0
        depth = config.n_layer if self.layers is None else len(self.layers)
        layers = depth if self.suggest_layers is None else self.suggest_layers
        return 3 * layers * (self.settings.platters**2 - 1) * 4 * config.context_length * config.n_embd


def arm_settings(given: Mapping[str, Any]) -> ArmSettings:
    """A condition's `retrofit` as plain values.

    Raises
    ------
    ValueError
        Naming a setting that is unknown, that the study gives itself, or that cannot be.
    """
    own = {each.name for each in fields(ArmSettings)} - {"settings", "tuning"}
    torus = {each.name for each in fields(ToroidalSettings)}
    tuned = {each.name for each in fields(TuneConfig)} - {*_FROM_TRAINING, "save_interval"}
    unknown = sorted(given.keys() - own - torus - tuned)
    if unknown:
        raise ValueError(
            f"retrofit has no setting {unknown[0]!r}; there are {', '.join(sorted(own | torus | tuned))}"
        )
    plain = {name: given[name] for name in own & given.keys()}
    if plain.get("layers") is not None:
        plain["layers"] = tuple(plain["layers"])
    if isinstance(plain.get("dataset_path"), list):
        plain["dataset_path"] = tuple(plain["dataset_path"])
    if plain.get("variant", "torus") not in get_args(Variant):
        raise ValueError(f"variant is {plain['variant']!r}: choose one of {', '.join(get_args(Variant))}")
    if not 0 <= plain.get("transfer", 0) <= 1:
        raise ValueError(f"transfer is {plain['transfer']}: a share of the steps from 0 to 1 is meant")
    settings = ToroidalSettings(**{name: given[name] for name in torus & given.keys()})
    return ArmSettings(**plain, settings=settings, tuning={n: given[n] for n in tuned & given.keys()})


def tuning_of(arm: ArmSettings, config: TrainConfig) -> TuneConfig:
    """The tuning: its form from the condition, its budget from the study."""
    assert config.max_steps is not None
    transfer = 0 if arm.variant in ("adapters", "random_swap") else round(arm.transfer * config.max_steps)
    chosen: dict[str, Any] = dict(arm.tuning)
    if arm.variant == "random_swap":
        chosen |= {"ramp": 0.0, "tune": "full", "kl_weight": 0.0, "hidden_weight": 0.0}
    return TuneConfig(
        **chosen,
        transfer_steps=transfer,
        steps=config.max_steps - transfer,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        lr=config.lr,
        bf16=config.bf16,
        seed=config.seed,
    )
