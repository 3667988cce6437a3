"""Learning-rate policies after a growth, on live optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from aiether.growth import LrPolicy, lr_factors


class SlowedTensors:
    """Lets some tensors move by a fraction of what their optimizer does.

    Every update of torch's optimizers is proportional to the learning rate, so this is a learning rate of
    their own, without a param group of their own: groups, schedules and saved states keep their form. It
    holds a copy of the tensors between `before` and `after`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._start: list[Tensor] | None = None

    @torch.no_grad()
    def before(self, factor: float) -> None:
        """Call before the optimizer steps."""
        self._factor = factor
        self._start = [p.detach().clone() for p in self.parameters] if factor < 1 else None

    @torch.no_grad()
    def after(self) -> None:
        """Call after it."""
        if self._start is None:
            return
        for parameter, start in zip(self.parameters, self._start, strict=True):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(torch.lerp(start.to(wide), parameter.to(wide), self._factor))
        self._start = None


_SCHEDULED: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()
"""During a step, the learning rates that it began with. Where several re-warms overlap (two growths soon
after each other) all scale the rates, and whichever is first to clean up puts the schedule's own back."""


class Rewarm:
    """A re-warm on live optimizers: hooks that scale their next steps, and do nothing once it is over.

    Learning rates are scaled during `optimizer.step()` only: a scheduler always finds its own values.
    It goes on by itself; to resume a run in its midst, save `state_dict()` and call `Rewarm.resume`. Re-warms
    of several growths may overlap: their factors multiply.

    Parameters
    ----------
    model: the grown model.
    optimizers: those that step its tensors.
    tensors: names of the new tensors.
    policy, rewarm_steps: as in `GrowthConfig`; the policy is "rewarm_new" or "rewarm_all".
    steps_done: steps since the growth, for each optimizer; default 0.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        tensors: Iterable[str],
        policy: LrPolicy,
        rewarm_steps: int,
        steps_done: Sequence[int] | None = None,
    ) -> None:
        self.policy: LrPolicy = policy
        self.rewarm_steps = rewarm_steps
        self.steps_done = list(steps_done or [0] * len(optimizers))
        parameters, names = dict(model.named_parameters()), tuple(tensors)
        if unknown := [name for name in names if name not in parameters]:
            raise ValueError(
                f"the model has no tensor {unknown[0]!r} to re-warm: give the bare grown model, as it was "
                "when the re-warm was saved"
            )
        new = {id(parameters[name]) for name in names}
        self._model, self._new = model, new
        self._handles: list[list[Any]] = []
        for index, optimizer in enumerate(optimizers):
            held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in new]
            self._handles.append(self._attach(index, optimizer, held))

    @classmethod
    def resume(
        cls, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], state: Mapping[str, Any]
    ) -> Rewarm:
        """Go on with a re-warm that `state_dict` described, on optimizers in the same order."""
        given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        if len(given) != len(state["steps_done"]):
            raise ValueError(
                f"the re-warm was of {len(state['steps_done'])} optimizers, {len(given)} are given: give the "
                "same ones in the same order"
            )
        return cls(
            model, given, state["tensors"], state["policy"], state["rewarm_steps"], state["steps_done"]
        )

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the new tensors, as they are now: a later growth moves layers."""
        return tuple(name for name, p in self._model.named_parameters() if id(p) in self._new)

    @property
    def finished(self) -> bool:
        return all(done >= self.rewarm_steps for done in self.steps_done)

    def state_dict(self) -> dict[str, Any]:
        """JSON that `resume` takes."""
        return {
            "policy": self.policy,
            "rewarm_steps": self.rewarm_steps,
            "tensors": list(self.tensors),
            "steps_done": list(self.steps_done),
        }

    def remove(self) -> None:
        """End it now: the next step is at the schedule's learning rate."""
        for handles in self._handles:
            for handle in handles:
                handle.remove()

    def _attach(self, index: int, optimizer: Optimizer, held: list[Tensor]) -> list[Any]:
        slowed = SlowedTensors(held)

        def before(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            if self.steps_done[index] >= self.rewarm_steps:
                return
            factors = lr_factors(self.policy, self.steps_done[index], self.rewarm_steps)
            _SCHEDULED.setdefault(stepped, [group["lr"] for group in stepped.param_groups])
            for group in stepped.param_groups if factors.old < 1 else ():
                group["lr"] = group["lr"] * factors.old
            slowed.before(factors.new / factors.old)

        def after(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            if self.steps_done[index] >= self.rewarm_steps:
                return
            slowed.after()
            for group, lr in zip(stepped.param_groups, _SCHEDULED.pop(stepped, ()), strict=False):
                group["lr"] = lr
            self.steps_done[index] += 1

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def check_rewarm(policy: LrPolicy, optimizers: Iterable[Optimizer]) -> None:
    """Raise ValueError if a policy scales learning rates that an optimizer makes for itself."""
    if policy != "rewarm_all":
        return
    for optimizer in optimizers:
        if any(group.get("lr") is None or group.get("relative_step") for group in optimizer.param_groups):
            raise ValueError(
                f"lr_policy='rewarm_all' scales the learning rate, and {type(optimizer).__name__} makes its "
                "own: use 'rewarm_new' or 'unchanged', or give it an lr with relative_step=False"
            )


def restart_schedulers(undo: ExitStack, schedulers: Sequence[Any]) -> None:
    """Begin the schedulers' sequences again from their first step, each with its own length.

    Raises
    ------
    ValueError
        For schedulers that keep no beginning to go back to.
    """
    for scheduler in schedulers:
        if not isinstance(scheduler, LRScheduler) or isinstance(
            scheduler, ReduceLROnPlateau | SequentialLR | ChainedScheduler
        ):
            raise ValueError(
                f"lr_policy='restart' cannot begin a {type(scheduler).__name__} again: use 'unchanged', and "
                "make a new scheduler over the same optimizer (its groups stay as they are)"
            )
    for optimizer in {id(scheduler.optimizer): scheduler.optimizer for scheduler in schedulers}.values():
        for group in optimizer.param_groups:
            undo.callback(_set_rate, group, _copied(group["lr"]))
            _set_rate(group, group["initial_lr"])
    for scheduler in schedulers:  # several on one optimizer multiply: each starts from the last one's rate
        undo.callback(_restore, scheduler, dict(vars(scheduler)))
        scheduler.last_epoch = -1
        scheduler._initial_step()


def _set_rate(group: dict[str, Any], lr: Any) -> None:
    """A rate that is a tensor stays the same one: schedulers and compiled optimizers write into it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _copied(lr: Any) -> Any:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _restore(scheduler: LRScheduler, attributes: dict[str, Any]) -> None:
    vars(scheduler).clear()
    vars(scheduler).update(attributes)
