"""What a growth does, as a description: which layer each layer of the grown model comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from .config import GrowthConfig, Initialiser, Placement
from .families import family_of


@dataclass(frozen=True)
class LayerOrigin:
    """One layer of the grown model: the old layer `source` itself, or a new one made from it."""

    source: int
    is_new: bool


@dataclass(frozen=True)
class GrowthPlan:
    """From `depth_before` layers to `len(layers)`; pure data.

    Every old layer appears once, in its old order; the others are new. A plan without a new layer is refused:
    surgery that changes nothing is a mistake somewhere else.
    """

    depth_before: int
    layers: tuple[LayerOrigin, ...]
    init: Initialiser
    placement: Placement

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
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement is {self.placement!r}: choose one of {', '.join(get_args(Placement))}"
            )

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
        layers = " ".join(
            f"+{origin.source}" if origin.is_new else str(origin.source) for origin in self.layers
        )
        return f"{self.depth_before} -> {self.depth_after} layers ({self.placement}, {self.init}): {layers}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` inverts it."""
        return {
            "depth_before": self.depth_before,
            "depth_after": self.depth_after,
            "placement": self.placement,
            "init": self.init,
            "layers": [{"source": origin.source, "is_new": origin.is_new} for origin in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthPlan:
        layers = tuple(LayerOrigin(entry["source"], entry["is_new"]) for entry in data["layers"])
        return cls(data["depth_before"], layers, data["init"], data["placement"])

    @classmethod
    def stack(cls, depth: Any, to_layers: int, init: Initialiser = "copy") -> GrowthPlan:
        """Copies of the whole stack above it: 0 1 2 0 1 2."""
        return cls._placed(depth, to_layers, init, "stack")

    @classmethod
    def interleave(cls, depth: Any, to_layers: int, init: Initialiser = "copy") -> GrowthPlan:
        """Each layer followed by its copies: 0 0 1 1 2 2."""
        return cls._placed(depth, to_layers, init, "interleave")

    @classmethod
    def top(cls, depth: Any, to_layers: int, init: Initialiser = "copy") -> GrowthPlan:
        """Copies of the last layer above it: 0 1 2 2 2 2."""
        return cls._placed(depth, to_layers, init, "top")

    @classmethod
    def front(cls, depth: Any, to_layers: int, init: Initialiser = "copy") -> GrowthPlan:
        """New layers before the frontier, the lowest layer (Algorithm 2): 0 0 0 0 1 2."""
        return cls._placed(depth, to_layers, init, "front")

    @classmethod
    def _placed(cls, depth: Any, to_layers: int, init: Initialiser, placement: Placement) -> GrowthPlan:
        before = depth_of(depth)
        if to_layers <= before:
            raise ValueError(
                f"to_layers is {to_layers}, the model has {before} already: ask for more layers than that"
            )
        return cls(before, PLACEMENTS[placement](before, to_layers), init, placement)


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


def depth_of(source: Any) -> int:
    """The number of layers: of a model, a configuration, a configuration dict, or the number itself."""
    if isinstance(source, int):
        return source
    config = getattr(source, "config", source)
    return family_of(config).depth(config if isinstance(config, Mapping) else config.to_dict())


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
