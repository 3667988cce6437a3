"""Where a plain module states its depth beside its list of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from torch import nn
from transformers import PreTrainedModel

from aiether.growth import Family

_NAMES = {"num_layers", "n_layer", "n_layers", "depth", "num_hidden_layers", "num_blocks", "n_blocks"}


def install_depth(undo: ExitStack, model: nn.Module, family: Family, before: int, after: int) -> list[str]:
    """Set the numbers of layers in the modules that contain the block list, which their loops may run by.

    Such a number is an attribute with a usual name and the old depth as its value. In models of transformers
    the configuration counts, and `compare_with_fresh` finds what states the depth beside it.

    Returns
    -------
    What was set, for the report.
    """
    notes: list[str] = []
    if isinstance(model, PreTrainedModel):
        return notes
    for path, module in _around(model, family):
        for name, value in vars(module).items():
            if name.lstrip("_") in _NAMES and type(value) is int and value == before:
                undo.callback(setattr, module, name, value)
                setattr(module, name, after)
                notes.append(f"{path + '.' if path else ''}{name} was set from {before} to {after}")
    return notes


def check_no_other_config(model: nn.Module, family: Family) -> None:
    """Raise ValueError if the blocks belong to a transformers model whose configuration is not `model`'s."""
    inner = next(((path, m) for path, m in _around(model, family) if isinstance(m, PreTrainedModel)), None)
    if inner is not None and inner[1].config is not getattr(model, "config", None):
        raise ValueError(
            f"{inner[0]!r} is a model of transformers, whose configuration must grow with it: grow it "
            f"itself, aiether.grow(model.{inner[0]}, plan, optimizer=...) with the optimizer of all tensors"
        )


def _around(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """The modules that contain the block list, outermost first, with their paths."""
    parts = family.blocks.split(".")
    for length in range(len(parts)):
        path = ".".join(parts[:length])
        yield path, model.get_submodule(path)
