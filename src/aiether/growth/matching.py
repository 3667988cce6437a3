"""Do a grown model's layers do what their sources did? Asked of the modules, not of the plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from .families import Family
from .plan import GrowthPlan
from .structure import blocks_at

_INDEX_NAMES = ("layer_idx", "layer_index", "layer_id", "layer_number")


def index_attributes(blocks: nn.ModuleList | nn.Sequential) -> tuple[tuple[str, str], ...]:
    """Where blocks keep their own index: (path of the submodule in the block, attribute).

    An attribute that counts up by one from block to block, from 0 or from 1. Where a single block has it, or
    some have none (those around which no token is routed), that tells nothing and the usual names decide.
    Growth in place must renumber them all: two layers of one index share an entry in the generation cache.
    """
    settings = [_settings(block) for block in blocks]
    places = dict.fromkeys(place for own in settings for place in own)
    return tuple(place for place in places if _counts_up(place, settings))


def _counts_up(place: tuple[str, str], settings: list[dict[tuple[str, str], Any]]) -> bool:
    """Whether a value follows the blocks' numbers; where not every block has it, its name must say so too."""
    held = [(layer, own[place]) for layer, own in enumerate(settings) if place in own]
    if any(not isinstance(value, int) or isinstance(value, bool) for _, value in held):
        return False
    if len(held) < max(2, len(settings)) and place[1] not in _INDEX_NAMES:
        return False
    return len({value - layer for layer, value in held}) == 1


def _settings(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Every plain value that a block and its submodules hold, by (path, attribute)."""
    return {
        (path, name): value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and name != "training"
    }


def check_blocks_match(before: nn.Module, after: nn.Module, plan: GrowthPlan, family: Family) -> None:
    """Compare each layer of a grown model with the layer that it stands for or was made from.

    Class, tensor names and shapes, and plain settings (window, rotary, scaling) must agree: a configuration
    may give a layer its form by its index, and then a moved layer is another layer.

    Parameters
    ----------
    before, after: models freshly built from the two configurations; on the meta device they cost nothing. (A
        model in use differs in what its user has switched on.)

    Raises
    ------
    ValueError
        Naming the first difference.
    """
    old, new = blocks_at(before, family.blocks), blocks_at(after, family.blocks)
    if len(old) != plan.depth_before or len(new) != plan.depth_after:
        raise ValueError(
            f"the models have {len(old)} and {len(new)} layers, the plan goes from {plan.depth_before} to "
            f"{plan.depth_after}: grow by a plan that was made from this model"
        )
    ignored = {*index_attributes(old), *index_attributes(new)}
    for layer, origin in enumerate(plan.layers):
        if difference := _difference(old[origin.source], new[layer], ignored):
            raise ValueError(
                f"layer {layer} of the grown {family.model_type} would not be what layer {origin.source} was "
                f"({difference}): its configuration ties the two to their index; choose another placement"
            )


def _difference(source: nn.Module, layer: nn.Module, ignored: set[tuple[str, str]]) -> str | None:
    if type(source) is not type(layer):
        return f"{type(source).__name__} became {type(layer).__name__}"
    shapes = [{name: tuple(t.shape) for name, t in block.state_dict().items()} for block in (source, layer)]
    for name in shapes[0] | shapes[1]:
        first, second = (own.get(name, "nothing") for own in shapes)
        if first != second:
            return f"{name} was {first} and is {second}"
    settings = [_settings(block) for block in (source, layer)]
    for place in settings[0] | settings[1]:
        first, second = (own.get(place) for own in settings)
        if first != second and place not in ignored:
            return f"{'.'.join(filter(None, place))} was {first} and is {second}"
    return None
