"""Live optimizers after a growth: new tensors in their sources' groups, with the moments that were declared.

The optimizer and its groups stay the same objects, and old tensors keep their state untouched. Inside a group
the order is that of the grown model's `named_parameters()`, as an optimizer built anew has it: a saved state,
which torch loads by position, then fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from aiether.growth import Moments as MomentsChoice

from ._checkpoint import Moments
from ._verify import GrowthError


@dataclass(frozen=True)
class GroupChange:
    """Tensors of one param group before and after a growth."""

    optimizer: int
    group: int
    before: int
    after: int


def unwrap_optimizers(optimizer: Any) -> list[Optimizer]:
    """The torch optimizers that a user gave: one, several or none, also wrapped by Accelerate or Lightning.

    Raises
    ------
    ValueError
        For what is no torch optimizer, or one that cannot take new tensors.
    """
    given = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
    found: list[Optimizer] = []
    for one in given:
        inner = getattr(one, "optimizer", one)
        if not isinstance(inner, Optimizer):
            raise ValueError(
                f"optimizer is a {type(one).__name__}: give a torch.optim.Optimizer, or a list of them"
            )
        _check_growable(inner)
        found.append(inner)
    return found


def _check_growable(optimizer: Optimizer) -> None:
    """Groups and state must be all that the optimizer knows of its tensors."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    name = type(optimizer).__name__
    for attribute, value in vars(optimizer).items():
        if attribute in ("param_groups", "state", "defaults"):
            continue
        items = list(_contents(value, skipped={id(group) for group in optimizer.param_groups}))
        if any(isinstance(item, Tensor) and id(item) in held for item in items):
            raise ValueError(
                f"{name} keeps its tensors in {attribute!r} as well as in its groups, so it cannot take new "
                "ones: build it anew over the grown model (optimizer=None grows the model alone)"
            )
        for inner in items:
            if isinstance(inner, Optimizer) and not _borrows(inner, optimizer):
                raise ValueError(
                    f"{name} holds a {type(inner).__name__} with groups or state of its own: give the parts, "
                    "optimizer=[...]"
                )


def _contents(value: Any, skipped: set[int], depth: int = 4) -> Iterator[Any]:
    """What lies in nested containers; the optimizer's own groups (`skipped`) grow wherever they stand."""
    if id(value) in skipped or not depth:
        return
    if not isinstance(value, list | tuple | set | Mapping):
        yield value
        return
    for inner in value.values() if isinstance(value, Mapping) else value:
        yield from _contents(inner, skipped, depth - 1)


def _borrows(inner: Optimizer, outer: Optimizer) -> bool:
    groups = {id(group) for group in outer.param_groups}
    return inner.state is outer.state and all(id(group) in groups for group in inner.param_groups)


def check_covers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Every trainable tensor is in one of the optimizers, once.

    Raises
    ------
    GrowthError
        Naming the tensor that would never train, or be stepped twice.
    """
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    known = set(held)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        raise GrowthError(
            f"{len(missing)} trainable tensors are in none of the optimizers, first {missing[0]!r}: they "
            "would never train; give all optimizers of the model, or freeze the tensors with "
            "requires_grad_(False)"
        )
    if len(known) != len(held):
        raise GrowthError("a tensor is in the optimizers twice: it would be stepped twice")


def moments_of(model: nn.Module, optimizers: Iterable[Optimizer]) -> Moments:
    """Optimizer state by parameter name, over all optimizers (references, not copies)."""
    states = {id(p): entries for optimizer in optimizers for p, entries in optimizer.state.items() if entries}
    return {
        name: {key: value for key, value in states[id(p)].items() if value is not None}
        for name, p in model.named_parameters()
        if id(p) in states
    }


@dataclass(frozen=True)
class GrownTensors:
    """What became of a model's parameters.

    Attributes
    ----------
    names_before: by a parameter's id, its name in the model before the growth.
    parameters: the grown model's, by name, in its order.
    new_of: by a name from before, the names of the tensors that were made from it.
    """

    names_before: Mapping[int, str]
    parameters: Mapping[str, nn.Parameter]
    new_of: Mapping[str, Sequence[str]]

    @cached_property
    def name_now(self) -> dict[int, str]:
        """By id, a parameter's name in the grown model."""
        return {id(p): name for name, p in self.parameters.items()}

    @cached_property
    def place(self) -> dict[int, int]:
        """By id, a parameter's place in the grown model's order."""
        return {key: place for place, key in enumerate(self.name_now)}


def grow_optimizer(
    undo: ExitStack,
    index: int,
    optimizer: Optimizer,
    tensors: GrownTensors,
    moments: Moments,
    choice: MomentsChoice,
) -> list[GroupChange]:
    """Take the grown model's new tensors into a live optimizer.

    Parameters
    ----------
    undo: receives the inverse of every change.
    index: the optimizer's place among several.
    tensors: the model's parameters before and after.
    moments: state by name in the grown model.
    choice: `reset` also drops the state of the old tensors.
    """
    _undo_state(undo, optimizer)
    changes = []
    for number, group in enumerate(optimizer.param_groups):
        old = list(group["params"])
        grown = grow_group(old, tensors)
        changes.append(GroupChange(index, number, len(old), len(grown)))
        if "param_names" in group:
            _assign(undo, group["param_names"], _grow_names(old, grown, group["param_names"], tensors))
        _assign(undo, group["params"], grown)
        for parameter in grown:
            name, is_new = tensors.name_now.get(id(parameter)), id(parameter) not in tensors.names_before
            if name is None or not (is_new or choice == "reset"):
                continue
            optimizer.state.pop(parameter, None)
            if entries := _starting_state(
                optimizer, group, parameter, moments.get(name, {}) if is_new else {}
            ):
                optimizer.state[parameter] = entries
    return changes


def _undo_state(undo: ExitStack, optimizer: Optimizer) -> None:
    before = dict(optimizer.state)

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(before)

    undo.callback(restore)


def _starting_state(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, entries: Mapping[str, Any]
) -> dict[str, Any]:
    if entries or not isinstance(optimizer, Adagrad):
        return dict(entries)
    # The one optimizer of torch's that makes its state when it is built, not at a tensor's first step.
    return {
        "step": torch.tensor(0.0),
        "sum": torch.full_like(parameter, group["initial_accumulator_value"]),
    }


def _assign(undo: ExitStack, target: list[Any], values: list[Any]) -> None:
    """In place: combined optimizers lend these lists to the ones inside them."""
    undo.callback(target.__setitem__, slice(None), list(target))
    target[:] = values


def grow_group(old: Sequence[nn.Parameter], tensors: GrownTensors) -> list[nn.Parameter]:
    """A group's tensors with those made from them, in the grown model's order if they had the model's order.

    A group in an order of the user's own keeps it, each new tensor right after its source. Tensors of other
    modules stay behind their neighbour.
    """
    chunks: list[list[nn.Parameter]] = [[]]  # the first holds what comes before any of the model's tensors
    for parameter in old:
        if id(parameter) in tensors.place:
            chunks.append([parameter])
        else:
            chunks[-1].append(parameter)
    leading, *own = chunks
    trailing: list[nn.Parameter] = []
    if own:
        own[-1], trailing = own[-1][:1], own[-1][1:]
    grown: list[list[nn.Parameter]] = []
    for chunk in own:
        grown.append(chunk)
        name = tensors.names_before[id(chunk[0])]
        grown += [[tensors.parameters[new]] for new in tensors.new_of.get(name, ())]
    if is_ordered([chunk[0] for chunk in own], tensors.place):
        grown.sort(key=lambda chunk: tensors.place[id(chunk[0])])
    return [*leading, *(p for chunk in grown for p in chunk), *trailing]


def is_ordered(params: Iterable[Tensor], place: Mapping[int, int]) -> bool:
    """Whether tensors come in the order that `place` gives by their ids; those without one do not count."""
    places = [place[id(p)] for p in params if id(p) in place]
    return places == sorted(places)


def _grow_names(
    old: Sequence[nn.Parameter],
    grown: Sequence[nn.Parameter],
    old_names: Sequence[str],
    tensors: GrownTensors,
) -> list[str]:
    """Names that a user gave to a group's tensors: moved layers have new ones, with the same prefix."""
    given = dict(zip(map(id, old), old_names, strict=True))
    prefix = ""
    for key, name in given.items():
        before = tensors.names_before.get(key)
        if before is not None and name.endswith(before):
            prefix = name.removesuffix(before)
            break
    return [prefix + tensors.name_now[id(p)] if id(p) in tensors.name_now else given[id(p)] for p in grown]
