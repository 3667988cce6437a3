"""What a torus is: platters, period, distance, and how strong each of them is once the change is complete."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal, get_args

Distance = Literal["chordal", "triangle", "harmonics"]
FusionMode = Literal["low_rank", "attention", "mean"]
Backend = Literal["auto", "flash", "flex", "eager", "cudnn"]


@dataclass(frozen=True)
class ToroidalSettings:
    """The attention's form, and its targets: what holds at progress 1. At progress 0 it is plain attention.

    Attributes
    ----------
    platters: D, into which a head's dimensions are split.
    period: P, tokens around the ring. It is fixed: a period that were the sequence's length would let the
        future change the past.
    distance: `chordal`, (1 - cos(2 pi d / P)) / 4, or `triangle`, min(d, P - d) / P; both are 1/2 at P/2.
        `harmonics` is the triangle by its first four harmonics, off by 0.013 at most, for kernels that take
        no bias.
    lambda_distance: what a distance of 1 takes from a logit. Learned per head, and per token where
        `token_lambda`, between it divided by and times `lambda_range`.
    gate: the share g of a score that is the platter's own instead of the whole head's.
    cross: beta, added to scores between different platters; learned per head within `cross_range` of it.
    fusion_mode: how a token's platters are mixed afterwards, `fusion_rank` of `low_rank` and `attention`.
    sinks: tokens at the beginning that no distance is taken from, since attention rests on them (Xiao et al.
        2024, arXiv:2309.17453).
    window: how far a token sees around the ring, in tokens; None: everywhere.
    platter_rotary: turn a platter's queries and keys by the platter's angle, the third axis of rotation.
    shuffled: a control: places stand on the ring in a random order, the same for all heads and layers.
    backend: the kernels; `auto`: the fused ones that can, but never `cudnn`, which has to be asked for (see
        `set_backend`).
    """

    platters: int = 2
    period: int = 2048
    distance: Distance = "chordal"
    lambda_distance: float = 2.0
    lambda_range: float = 2.0
    token_lambda: bool = True
    gate: float = 0.5
    cross: float = -2.0
    cross_range: float = 2.0
    fusion_mode: FusionMode = "low_rank"
    fusion_rank: int = 1
    sinks: int = 4
    window: int | None = None
    platter_rotary: bool = False
    shuffled: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        for name, kind in (("distance", Distance), ("fusion_mode", FusionMode), ("backend", Backend)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose one of {', '.join(get_args(kind))}"
                )
        for name, least in (("platters", 1), ("period", 2), ("fusion_rank", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: it must be at least 1, or None for no window")
        if not 0 <= self.gate <= 1:
            raise ValueError(f"gate is {self.gate}: a share from 0 to 1 is meant")
        for name, least in (("lambda_distance", 0), ("cross_range", 0), ("lambda_range", 1)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: a number from {least} upward is meant")
        if not math.isfinite(self.cross):
            raise ValueError(
                f"cross is {self.cross}: a number is meant; -30 keeps platters apart, 0 lets them be one"
            )
        if self.backend in ("flash", "cudnn") and (self.window is not None or self.distance == "triangle"):
            raise ValueError(
                f"backend={self.backend!r} takes neither a window nor distance='triangle': choose "
                "distance='harmonics' or 'chordal' without a window, or backend='flex' or 'eager'"
            )

    def _check_types(self) -> None:
        counts = ("platters", "period", "fusion_rank", "sinks", "window")
        switches = ("token_lambda", "platter_rotary", "shuffled")
        amounts = ("lambda_distance", "lambda_range", "gate", "cross", "cross_range")
        for names, kind, words in (
            (counts, Integral, "a whole number"),
            (switches, bool, "True or False"),
            (amounts, Real, "a number"),
        ):
            for name in names:
                value = getattr(self, name)
                other = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
                if other and not (name == "window" and value is None):
                    raise ValueError(f"{name} is {value!r}: {words} is meant")

    def check_head(self, head_dim: int) -> None:
        """Raises ValueError if the platters cannot share a head of this size."""
        if head_dim % self.platters:
            fitting = [n for n in range(1, head_dim + 1) if head_dim % n == 0 and n <= 16]
            raise ValueError(
                f"platters is {self.platters}, which does not divide the heads' {head_dim} dimensions: "
                f"choose one of {', '.join(map(str, fitting))}"
            )
        if self.platter_rotary and (head_dim // self.platters) % 2:
            raise ValueError(
                f"platter_rotary turns pairs of dimensions, and a platter has {head_dim // self.platters}: "
                "choose fewer platters, or leave it out"
            )


def settings_of(settings: ToroidalSettings | None, options: dict[str, object]) -> ToroidalSettings:
    """The settings, given whole or as options.

    Raises
    ------
    ValueError
        If both are given, an option is none, or the settings are something else.
    """
    if settings is not None and not isinstance(settings, ToroidalSettings):
        raise ValueError(
            f"settings is {settings!r}: ToroidalSettings are meant; name its fields one by one instead"
        )
    if settings is not None and options:
        raise ValueError(
            f"settings are given whole, and {', '.join(options)} beside them: give one of the two"
        )
    names = [each.name for each in fields(ToroidalSettings)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting of a torus; there are {', '.join(names)}")
    return settings or ToroidalSettings(**options)  # type: ignore[arg-type]
