"""What a growth in place did, and what it did to the model's function on a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aiether.growth import GrowthPlan, LrPolicy
from aiether.growth import Moments as MomentsChoice

from ._grow_optimizer import GroupChange
from ._lr_policy import Rewarm

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class FunctionChange:
    """A batch before and after a growth, in evaluation mode.

    Attributes
    ----------
    gap: E|f_new - f_old|^2, the squared distance of the outputs (logits), mean over the batch's positions.
    relative_gap: the gap over E|f_old|^2.
    loss_before, loss_after: the model's loss (mean, nats for a language model); None where it gives none.
    """

    gap: float
    relative_gap: float
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True, kw_only=True)
class GrowthReport:
    """What changed.

    Attributes
    ----------
    plan: the plan that was carried out.
    new_tensors: names of the new parameters in the grown model.
    parameters_before, parameters_after: number of weights.
    groups: tensors of every param group, before and after.
    moments, lr_policy, rewarm_steps: what was chosen.
    function: on the batch that was given; None without one.
    tensor_metrics: by name of a new tensor, what its initialiser measured.
    notes: what the user should know and growth could not decide.
    seconds: wall-clock time, measurements included.
    rewarm: the re-warm that is under way, whose `state_dict()` belongs in a checkpoint; else None.
    """

    plan: GrowthPlan
    new_tensors: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    groups: tuple[GroupChange, ...]
    moments: MomentsChoice
    lr_policy: LrPolicy
    rewarm_steps: int
    function: FunctionChange | None
    tensor_metrics: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    seconds: float
    rewarm: Rewarm | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the re-warm's progress."""
        skipped = ("plan", "rewarm", "groups", "function")
        plain = {key: value for key, value in vars(self).items() if key not in skipped}
        return plain | {
            "plan": self.plan.to_dict(),
            "groups": [asdict(change) for change in self.groups],
            "function": None if self.function is None else asdict(self.function),
        }

    def __str__(self) -> str:
        added = self.parameters_after - self.parameters_before
        lines = [
            self.plan.describe(),
            f"{len(self.new_tensors)} new tensors, {self.parameters_before:,} + {added:,} weights",
        ]
        lines += [
            f"optimizer {change.optimizer}, group {change.group}: {change.before} -> {change.after} tensors"
            for change in self.groups
        ]
        warm = f" over {self.rewarm_steps} steps" if self.lr_policy.startswith("rewarm") else ""
        if self.groups:
            lines.append(f"moments of new tensors: {self.moments}; learning rate: {self.lr_policy}{warm}")
        else:
            lines.append("no optimizer was given: nothing trains the new tensors yet")
        if self.function is not None:
            lines.append(
                f"function gap {self.function.gap:.4g} ({self.function.relative_gap:.2%} of the output)"
            )
            if self.function.loss_before is not None and self.function.loss_after is not None:
                lines.append(f"loss {self.function.loss_before:.4f} -> {self.function.loss_after:.4f}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Measured:
    """A model's output (..., features) and loss on one batch, and for each block whether it ran."""

    output: Tensor
    loss: float | None
    ran: tuple[bool, ...]


@torch.no_grad()
def measure(model: nn.Module, batch: Any, loss_fn: LossFn | None, blocks: nn.Module) -> Measured:
    """Run one batch in evaluation mode, eagerly, leaving modes and random generators as they were.

    Parameters
    ----------
    batch: keyword arguments (a mapping), positional ones (a tuple or list), or the one argument.
    loss_fn: (output, batch) -> scalar; default: the output's `loss`, if it has one.
    blocks: the list of blocks.
    """
    with _evaluating(model), _watching(blocks) as ran, torch.compiler.set_stance("force_eager"):
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = loss_fn(output, batch) if loss_fn is not None else getattr(output, "loss", None)
    count = len(list(blocks.children()))
    seen = tuple(index in ran for index in range(count))
    return Measured(_first_tensor(output).detach(), None if loss is None else float(loss), seen)


@contextmanager
def _watching(blocks: nn.Module) -> Iterator[set[int]]:
    """Indices of the blocks that run: which are called, or a module of theirs that no other block has."""
    owners = Counter(id(module) for block in blocks.children() for module in block.modules())
    ran: set[int] = set()
    with ExitStack() as remove:
        for index, block in enumerate(blocks.children()):
            for module in block.modules():
                if owners[id(module)] == 1:
                    hook = partial(_note_index, ran, index)
                    remove.callback(module.register_forward_pre_hook(hook).remove)
        yield ran


def _note_index(ran: set[int], index: int, *_: Any) -> None:
    ran.add(index)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    for value in (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    ):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError(
        f"the model returned {type(output).__name__}, in which no output tensor was found: leave batch out"
    )


def function_change(before: Measured, after: Measured) -> FunctionChange:
    """The distance between two outputs for the same batch."""
    old, new = before.output.float(), after.output.float()
    if old.shape != new.shape:
        raise ValueError(f"the output's shape changed from {tuple(old.shape)} to {tuple(new.shape)}")
    gap = float((new - old).square().sum(dim=-1).mean())
    size = float(old.square().sum(dim=-1).mean())
    return FunctionChange(gap, gap / size if size else float("inf") if gap else 0.0, before.loss, after.loss)
