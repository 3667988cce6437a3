"""Optimizer and scheduler state, carried from one model to the next by parameter name.

torch.optim loads state by position, so a changed model would silently receive its neighbours' moments.
Here every entry goes by name, and what does not fit raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ._checkpoint import Moments, to_json
from ._verify import check_optimizer_covers


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's wrapper, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, Optimizer)
    return inner


def capture_moments(model: nn.Module, optimizer: Optimizer) -> Moments:
    """Optimizer state by parameter name (references, not copies).

    Raises
    ------
    GrowthError
        If a trainable tensor is not in the optimizer: it was added or unfrozen since the optimizer was built,
        has never trained, and would be saved as if it had.
    """
    check_optimizer_covers(model, optimizer)
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if value is not None}
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


def load_moments(model: nn.Module, optimizer: Optimizer, moments: Moments) -> None:
    """Give each named parameter its state, on its device; parameters without an entry start fresh.

    Raises
    ------
    ValueError
        If an entry names a parameter that the optimizer does not hold, or a moment's shape differs.
    """
    parameters = dict(model.named_parameters())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, entries in moments.items():
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in group_of:
            raise ValueError(
                f"optimizer state for {name!r} has no parameter in the optimizer: it belongs to another "
                "architecture; resume the checkpoint with the model it was written for"
            )
        group = group_of[id(parameter)]
        optimizer.state[parameter] = {k: _place(k, v, parameter, group) for k, v in entries.items()}


def _place(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.ndim and value.numel() == parameter.numel() and value.shape != parameter.shape:
        raise ValueError(f"{key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
    # Adam's step counter stays on the CPU unless the kernel wants it on the device: a device counter under
    # the plain kernels costs one synchronisation a tensor and step.
    on_device = key != "step" or group.get("fused") or group.get("capturable")
    return value.to(device=parameter.device if on_device else "cpu", copy=True)


@dataclass(frozen=True)
class OptimizerRecipe:
    """How to build the user's own optimizer again: class, defaults and named groups."""

    optimizer_class: Callable[..., Optimizer]
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]

    @classmethod
    def of(cls, optimizer: Optimizer, model: nn.Module) -> OptimizerRecipe:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names]
            if unknown:
                raise ValueError(
                    f"the optimizer holds {len(unknown)} parameters that are not the model's (first shape "
                    f"{unknown[0]}); build it from model.parameters() of the model given to the Trainer"
                )
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            groups.append((tuple(names[id(p)] for p in group["params"]), settings))
        return cls(type(optimizer), tuple(groups))

    def renamed(self, renames: Mapping[str, tuple[str, ...]]) -> OptimizerRecipe:
        """The recipe for a grown model: `renames` maps an old name to every new name it became."""
        groups = tuple(
            (tuple(new for name in names for new in renames.get(name, (name,))), settings)
            for names, settings in self.groups
        )
        return OptimizerRecipe(self.optimizer_class, groups)

    def with_names(self, names: Sequence[Sequence[str]]) -> OptimizerRecipe:
        """The recipe with other names in its groups: those of a checkpoint's grown model."""
        settings = [settings for _, settings in self.groups]
        return OptimizerRecipe(self.optimizer_class, tuple(zip(map(tuple, names), settings, strict=True)))

    def build(self, model: nn.Module) -> Optimizer:
        parameters = dict(model.named_parameters())
        groups = [
            {
                **settings,
                "params": [parameters[n] for n in names],
                "lr": settings.get("initial_lr", settings["lr"]),
            }
            for names, settings in self.groups
        ]
        return self.optimizer_class(groups)


def rebind_scheduler(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    """Let a scheduler that the user built drive a rebuilt optimizer with the same groups."""
    for inner in getattr(scheduler, "_schedulers", ()):
        rebind_scheduler(inner, optimizer)
    previous = scheduler.optimizer
    for old, new in zip(previous.param_groups, optimizer.param_groups, strict=True):
        new["lr"] = old["lr"]
        if "initial_lr" in old:
            new["initial_lr"] = old["initial_lr"]
    scheduler.optimizer = optimizer


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's state as JSON (Python floats survive JSON exactly)."""
    return to_json(scheduler.state_dict())


def load_scheduler(scheduler: Any, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continue a schedule on fresh groups: the state, and the learning rate that it last set."""
    scheduler.load_state_dict(state)
    if "_last_lr" in state:
        for group, lr in zip(optimizer.param_groups, state["_last_lr"], strict=True):
            group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr
