"""What a growth does, as a description: which layer each layer of the grown model comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from .config import GrowthConfig, Initialiser, Placement
from .families import Family, family_of
from .structure import blocks_at, depth_key_of, settings_of

PlanPlacement = Placement | Literal["explicit"]
GAINS = ("beta0", "gamma0", "eta0")


@dataclass(frozen=True)
class LayerOrigin:
    """One layer of the grown model: the old layer `source` itself, or a new one made from it.

    A new layer may have coefficients of its own for the initialiser `geometric`; None takes those of the
    growth settings.
    """

    source: int
    is_new: bool
    beta0: float | None = None
    gamma0: float | None = None
    eta0: float | None = None

    @property
    def gains(self) -> dict[str, float]:
        """The layer's own coefficients, by the names that they have in `GrowthConfig`."""
        own = {name: getattr(self, name) for name in GAINS}
        return {name: value for name, value in own.items() if value is not None}

    def __str__(self) -> str:
        own = ", ".join(f"{name}={value:g}" for name, value in self.gains.items())
        return f"{'+' if self.is_new else ''}{self.source}{f' ({own})' if own else ''}"


@dataclass(frozen=True)
class GrowthPlan:
    """From `depth_before` layers to `len(layers)`; pure data.

    Every old layer appears once, in its old order; the others are new. A plan without a new layer is refused:
    surgery that changes nothing is a mistake somewhere else.
    """

    depth_before: int
    layers: tuple[LayerOrigin, ...]
    init: Initialiser
    placement: PlanPlacement

    def __post_init__(self) -> None:
        kept = [origin.source for origin in self.layers if not origin.is_new]
        if kept != list(range(self.depth_before)):
            raise ValueError(
                f"a plan keeps every old layer once and in order, not {kept} of {self.depth_before}"
            )
        if self.depth_after == self.depth_before:
            raise ValueError(
                f"the plan adds no layer to the {self.depth_before} there are: ask for more than that"
            )
        if any(not 0 <= origin.source < self.depth_before for origin in self.layers):
            raise ValueError(
                f"the plan copies a layer that does not exist: sources must lie in 0..{self.depth_before - 1}"
            )
        if self.init not in get_args(Initialiser):
            raise ValueError(f"init is {self.init!r}: choose one of {', '.join(get_args(Initialiser))}")
        placements = (*get_args(Placement), "explicit")
        if self.placement not in placements:
            raise ValueError(f"placement is {self.placement!r}: choose one of {', '.join(placements)}")
        self._check_gains()

    def _check_gains(self) -> None:
        for index, origin in enumerate(self.layers):
            if not origin.gains:
                continue
            if not origin.is_new or self.init != "geometric":
                raise ValueError(
                    f"layer {index} ({origin}) has coefficients of its own: they are for new layers, and for "
                    f"init 'geometric' (this plan's is {self.init!r})"
                )
            for name, value in origin.gains.items():
                if not (value >= 0 and math.isfinite(value)):
                    raise ValueError(f"{name} of layer {index} is {value}: it must be 0 or greater")

    @property
    def depth_after(self) -> int:
        return len(self.layers)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Indices of the new layers in the grown model."""
        return tuple(index for index, origin in enumerate(self.layers) if origin.is_new)

    @property
    def old_to_new(self) -> dict[int, int]:
        """Where each old layer stands in the grown model."""
        return {origin.source: index for index, origin in enumerate(self.layers) if not origin.is_new}

    @property
    def sources(self) -> frozenset[int]:
        """Old layers that a new one is made from."""
        return frozenset(origin.source for origin in self.layers if origin.is_new)

    def describe(self) -> str:
        """`3 -> 6 layers (stack, copy): 0 1 2 +0 +1 +2`, a plus before each new layer's source."""
        layers = " ".join(map(str, self.layers))
        return f"{self.depth_before} -> {self.depth_after} layers ({self.placement}, {self.init}): {layers}"

    def __str__(self) -> str:
        return self.describe()

    def with_gains(self, gains: Mapping[int, Mapping[str, float]]) -> GrowthPlan:
        """This plan with coefficients of their own for some new layers.

        Parameters
        ----------
        gains: by index in the grown model, any of `beta0`, `gamma0` and `eta0`, such as
            `{4: {"beta0": 0.2, "eta0": 0.0}}`.

        Raises
        ------
        ValueError
            For an index that is no new layer, an unknown name, or an initialiser other than `geometric`.
        """
        for index, own in gains.items():
            if index not in self.new_layers or not set(own) <= set(GAINS):
                raise ValueError(
                    f"coefficients {dict(own)} for layer {index}: give {', '.join(GAINS)} for new layers "
                    f"({', '.join(map(str, self.new_layers))})"
                )
        layers = tuple(replace(origin, **gains.get(index, {})) for index, origin in enumerate(self.layers))
        return replace(self, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` inverts it."""
        return {
            "depth_before": self.depth_before,
            "depth_after": self.depth_after,
            "placement": self.placement,
            "init": self.init,
            "layers": [
                {"source": origin.source, "is_new": origin.is_new, **origin.gains} for origin in self.layers
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthPlan:
        layers = tuple(LayerOrigin(**entry) for entry in data["layers"])
        return cls(data["depth_before"], layers, data["init"], data["placement"])

    @classmethod
    def stack(
        cls, source: Any, to_layers: int, init: Initialiser = "copy", *, family: Family | None = None
    ) -> GrowthPlan:
        """Copies of the whole stack above it: 0 1 2 0 1 2."""
        return cls._placed(source, to_layers, init, "stack", family)

    @classmethod
    def interleave(
        cls, source: Any, to_layers: int, init: Initialiser = "copy", *, family: Family | None = None
    ) -> GrowthPlan:
        """Each layer followed by its copies: 0 0 1 1 2 2."""
        return cls._placed(source, to_layers, init, "interleave", family)

    @classmethod
    def top(
        cls, source: Any, to_layers: int, init: Initialiser = "copy", *, family: Family | None = None
    ) -> GrowthPlan:
        """Copies of the last layer above it: 0 1 2 2 2 2."""
        return cls._placed(source, to_layers, init, "top", family)

    @classmethod
    def front(
        cls, source: Any, to_layers: int, init: Initialiser = "copy", *, family: Family | None = None
    ) -> GrowthPlan:
        """New layers before the frontier, the lowest layer (Algorithm 2): 0 0 0 0 1 2."""
        return cls._placed(source, to_layers, init, "front", family)

    @classmethod
    def explicit(
        cls,
        source: Any,
        layers: Sequence[int | str | LayerOrigin],
        init: Initialiser = "copy",
        *,
        family: Family | None = None,
    ) -> GrowthPlan:
        """Every layer of the grown model by name: `[0, "+0", 1, 2, "+2"]`, bottom first.

        Parameters
        ----------
        source: as for the other placements: a model, its configuration, or its number of layers.
        layers: a number is the old layer itself, a number after a plus a new layer made from that one; a
            `LayerOrigin` may carry coefficients of its own.
        """
        return cls(depth_of(source, family), tuple(map(_origin, layers)), init, "explicit")

    @classmethod
    def _placed(
        cls, source: Any, to_layers: int, init: Initialiser, placement: Placement, family: Family | None
    ) -> GrowthPlan:
        before = depth_of(source, family)
        if not _is_whole(to_layers):
            raise ValueError(f"to_layers is {to_layers!r}: give the number of layers to grow to, such as 24")
        if to_layers <= before:
            raise ValueError(
                f"to_layers is {to_layers}, the model has {before} already: ask for more layers than that"
            )
        return cls(before, PLACEMENTS[placement](before, to_layers), init, placement)


def _origin(layer: int | str | LayerOrigin) -> LayerOrigin:
    if isinstance(layer, LayerOrigin):
        return layer
    text = str(layer).strip()
    number = text.removeprefix("+")
    if not number.isdecimal():
        raise ValueError(
            f"{layer!r} is no layer of a plan: write 2 for old layer 2, '+2' for a new one from it"
        )
    return LayerOrigin(int(number), text.startswith("+"))


def _stack(depth: int, to_layers: int) -> tuple[LayerOrigin, ...]:
    return tuple(LayerOrigin(index % depth, index >= depth) for index in range(to_layers))


def _interleave(depth: int, to_layers: int) -> tuple[LayerOrigin, ...]:
    sources = [index * depth // to_layers for index in range(to_layers)]
    return tuple(LayerOrigin(s, index > 0 and sources[index - 1] == s) for index, s in enumerate(sources))


def _top(depth: int, to_layers: int) -> tuple[LayerOrigin, ...]:
    return tuple(LayerOrigin(min(index, depth - 1), index >= depth) for index in range(to_layers))


def _front(depth: int, to_layers: int) -> tuple[LayerOrigin, ...]:
    added = to_layers - depth
    return tuple(LayerOrigin(max(index - added, 0), index < added) for index in range(to_layers))


PLACEMENTS: dict[Placement, Callable[[int, int], tuple[LayerOrigin, ...]]] = {
    "stack": _stack,
    "interleave": _interleave,
    "top": _top,
    "front": _front,
}
"""Registry: (depth, to_layers) -> the origin of every layer, bottom first."""


def depth_of(source: Any, family: Family | None = None) -> int:
    """The number of layers: of a model, a configuration, a configuration dict, or the number itself.

    Parameters
    ----------
    family: where the blocks are, for a module without a configuration: the length of its list is the depth.

    Raises
    ------
    ValueError
        If neither a configuration nor a list of blocks says it, or the number is no whole one from 1.
    """
    if isinstance(source, bool | int | float):
        if not _is_whole(source) or source < 1:
            raise ValueError(
                f"{source!r} is no number of layers: give a model, its configuration, or a whole number"
            )
        return int(source)
    config = getattr(source, "config", source)
    if isinstance(source, nn.Module) and (family is not None or not hasattr(config, "to_dict")):
        return len(blocks_at(source, (family or family_of(source)).blocks))
    depth_key = family.depth_key if family else depth_key_of(config)
    values = settings_of(config)
    if depth_key is None or depth_key not in values:
        return (family or family_of(source)).depth(values)
    return int(values[depth_key])


def _is_whole(value: object) -> bool:
    """Whether it is a whole number; True and 4.0, which Python would take for one, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def frontier(placement: Placement, depth: int) -> int:
    """The layer next to which the next new layer goes: the lowest for `front`, else the last."""
    return 0 if placement == "front" else depth - 1


def next_depth(config: GrowthConfig, depth: int, *, final_depth: int) -> int | None:
    """Depth after the next growth, never beyond `final_depth`; None when growth is over."""
    if config.grow_to:
        return next((target for target in config.grow_to if depth < target <= final_depth), None)
    if depth >= final_depth:
        return None
    if config.grow_by == "max":
        return final_depth
    return min(2 * depth if config.grow_by == "double" else depth + config.grow_by, final_depth)


def depth_schedule(config: GrowthConfig, depth: int, *, final_depth: int) -> tuple[int, ...]:
    """All depths still to come, in order."""
    depths: list[int] = []
    while (
        following := next_depth(config, depths[-1] if depths else depth, final_depth=final_depth)
    ) is not None:
        depths.append(following)
    return tuple(depths)


def planned_depth(config: GrowthConfig, depth: int) -> int:
    """The final depth that initial scales and baselines use.

    `max_layers` where it is set, else the last of `grow_to`, else `depth` for trigger `never`, else twice
    `depth`: memory is finite, and the initial scale of the output projections needs a final depth.

    Raises
    ------
    ValueError
        If the model is deeper than its planned final depth.
    """
    if config.max_layers is not None:
        final = config.max_layers
    elif config.grow_to:
        final = max(config.grow_to[-1], depth)
    else:
        final = depth if config.trigger == "never" else 2 * depth
    if final < depth:
        raise ValueError(
            f"max_layers is {final}, the model starts with {depth}: raise max_layers or start smaller"
        )
    return final


def plan_growth(config: GrowthConfig, depth: int, *, final_depth: int) -> GrowthPlan | None:
    """The next growth by the configuration; None when the model has its final depth."""
    to_layers = next_depth(config, depth, final_depth=final_depth)
    if to_layers is None:
        return None
    return GrowthPlan(depth, PLACEMENTS[config.placement](depth, to_layers), config.init, config.placement)
