"""Sees the first step whose loss or gradients are not finite, without waiting for the device each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._checkpoint import Moments

_LOOK_AFTER = 64  # steps of which nothing else reads a value: bounds what is computed on ruined weights


class NotFinite(Exception):
    """The batch of the step after `step` made the loss, the gradient or the weights infinite or NaN."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what
        super().__init__(f"{what} in step {step + 1}")


class FiniteWatch:
    """Keeps one number a step on its device and reads them together, where the host waits anyway.

    On a CPU, where reading costs nothing, each is read at once: the weights are never touched by it.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[Tensor] = []

    def note(self, step: int, loss_sum: Tensor, gradient_norm: Any) -> None:
        """Take the running sum of losses and the gradient norm of the step after `step`.

        Raises
        ------
        NotFinite
            If one of the steps noted so far was not finite and it was time to look.
        """
        self._steps.append(step)
        norm = 0.0 if gradient_norm is None else gradient_norm  # a Trainer with a clipping of its own
        self._values.append(loss_sum.detach() + norm)  # finite if both are; one kernel
        if loss_sum.device.type == "cpu" or len(self._steps) >= _LOOK_AFTER:
            self.look()

    def look(self) -> None:
        """Read what was noted: one wait for the device.

        Raises
        ------
        NotFinite
            Naming the first step that was not finite.
        """
        steps, self._steps = self._steps, []
        values, self._values = self._values, []
        if not values:
            return
        for step, value in zip(steps, torch.stack(values).tolist(), strict=True):
            if not math.isfinite(value):
                raise NotFinite(step, "the loss or the gradient norm is not finite")


def not_finite(named_tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with an infinite or NaN entry, None if all are finite; one wait in all."""
    checked = {name: tensor for name, tensor in named_tensors if tensor.is_floating_point()}
    if not checked:
        return None
    device = next(iter(checked.values())).device
    finite = torch.stack([torch.isfinite(t.detach()).all().to(device) for t in checked.values()]).tolist()
    return next((name for name, whole in zip(checked, finite, strict=True) if not whole), None)


def moment_tensors(moments: Moments) -> Iterator[tuple[str, Tensor]]:
    """The tensors among optimizer moments but for counters, named as in "exp_avg of lm_head.weight"."""
    for name, entries in moments.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                yield f"{key} of {name}", value


@contextmanager
def gradient_norms(accelerator: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """Hand every gradient norm that the Trainer computes to `take`, as the tensor that it is.

    The Trainer computes it once a step, whether it clips or not, and tells callbacks only at log moments.
    """
    original, own = accelerator.clip_grad_norm_, vars(accelerator).get("clip_grad_norm_")

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        take(norm)
        return norm

    accelerator.clip_grad_norm_ = clip_grad_norm_
    try:
        yield
    finally:
        del accelerator.clip_grad_norm_
        if own is not None:
            accelerator.clip_grad_norm_ = own
