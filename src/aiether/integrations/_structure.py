"""Whether a model that was grown in place is the one that its configuration describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from aiether.growth import Family, GrowthPlan, check_blocks_match

from ._blocks import block_list
from ._described import fresh_model
from ._verify import GrowthError

_PLAIN = (int, float, str, type(None))


def compare_with_fresh(model: nn.Module, family: Family, plan: GrowthPlan, config_before: Any) -> str | None:
    """Compare a grown model with fresh ones of its configurations, which are built without memory.

    What the two configurations say of a layer must be the same before and after. What differs between the
    fresh model's layers (layer indices, attention types, rotary switches, classes) must be the same in the
    live ones, shapes too, and nothing outside of the blocks may still state the old depth. So a place that
    holds the depth and that growth does not know is found here.

    Returns
    -------
    None if they agree, or why they could not be compared.

    Raises
    ------
    GrowthError
        Naming the first thing in which the live model differs.
    ValueError
        If the configuration would give a moved or new layer another form than its source's.
    """
    if not isinstance(model, PreTrainedModel):
        return "not a transformers model: no fresh one can be built from a configuration to compare it with"
    try:
        small, fresh = fresh_model(model, config_before), fresh_model(model)
    except Exception as error:  # noqa: BLE001 - custom model code; the caller's report says that it was not checked
        return f"no fresh model could be built to compare with ({' '.join(str(error).split())[:120]})"
    live_blocks = list(block_list(model, family).children())
    fresh_blocks = list(block_list(fresh, family).children())
    if len(live_blocks) != len(fresh_blocks):
        raise GrowthError(
            f"a fresh model has {len(fresh_blocks)} layers in {family.blocks!r}, the grown one "
            f"{len(live_blocks)}: {family.depth_key!r} is not the number of these layers; name the setting "
            "that is, family_of(model, blocks=..., depth_key=...)"
        )
    check_blocks_match(small, fresh, plan, family)
    _compare_layers(live_blocks, fresh_blocks)
    _compare_shapes(model, fresh)
    _compare_depth(model, fresh, family, plan.depth_before, plan.depth_after)
    return None


def _attributes(block: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for path, module in block.named_modules():
        yield (path, "class"), type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) and name != "training":
                yield (path, name), value


def _compare_layers(live: list[nn.Module], fresh: list[nn.Module]) -> None:
    expected = [dict(_attributes(block)) for block in fresh]
    keys = {key for values in expected for key in values}
    missing = object()
    telling = sorted(key for key in keys if len({repr(values.get(key, missing)) for values in expected}) > 1)
    for layer, (block, values) in enumerate(zip(live, expected, strict=True)):
        actual = dict(_attributes(block))
        for key in telling:
            if key in values and actual.get(key, missing) != values[key]:
                path, name = key
                raise GrowthError(
                    f"layer {layer} has {name}={actual.get(key)!r} in {path or 'its block'!r}, a fresh model "
                    f"of the grown configuration {values[key]!r}: this plan does not fit this model"
                )


def _compare_shapes(model: nn.Module, fresh: nn.Module) -> None:
    shapes = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in shapes and parameter.shape != shapes[name]:
            raise GrowthError(
                f"{name!r} has shape {tuple(parameter.shape)}, in a fresh model of the grown configuration "
                f"{tuple(shapes[name])}: this plan does not fit this model"
            )


def _compare_depth(model: nn.Module, fresh: nn.Module, family: Family, before: int, after: int) -> None:
    modules = dict(model.named_modules())
    for path, module in fresh.named_modules():
        if f"{path}.".startswith(f"{family.blocks}.") or path not in modules:
            continue
        places = [(vars(modules[path]), vars(module))]
        if isinstance(module, PreTrainedModel):  # an encoder or decoder may have a configuration of its own
            own: Any = modules[path]
            places.append((own.config.to_dict(), module.config.to_dict()))
        for live, expected in places:
            for name, value in expected.items():
                if type(value) is int and value == after and live.get(name) == before:
                    raise GrowthError(
                        f"{path or 'the model'!r} still states {before} layers in {name!r}: it cannot grow "
                        "in place; aiether.migrate its state and build the model anew"
                    )
