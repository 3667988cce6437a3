"""Muon with matrices of one shape orthogonalised together.

torch.optim.Muon takes one matrix after the other: for a transformer that is some thirty small kernels a
matrix, and the launches cost more than the arithmetic. Here matrices of one shape (up to transposition) go
through the Newton-Schulz iteration as one batch. State, settings and the update are torch.optim.Muon's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

_MAX_BATCH_ELEMENTS = 1 << 27
"""Matrices are stacked up to this many elements (bfloat16: 256 MB, and as much again for two temporaries)."""


class BatchedMuon(Muon):
    """torch.optim.Muon (same arguments, same state) whose step works on batches of equal shapes.

    Differs from it by the rounding of bfloat16 products alone, which it uses on CUDA only. Source: Jordan
    et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale `match_rms_adamw` is
    Liu et al. 2025, "Muon is scalable for LLM training", section 2.2.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _batches(group["params"]):
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        nesterov = group["nesterov"]
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if nesterov else buffers  # pyright: ignore[reportPrivateImportUsage]
        wide = torch.stack([u if u.size(0) <= u.size(1) else u.T for u in updates])  # (N, A, B), A <= B
        directions = orthogonalise(
            wide.bfloat16() if wide.is_cuda else wide,  # processors without bfloat16 units emulate them
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
        ).unbind()
        lr = float(group["lr"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        for parameter, direction in zip(parameters, directions, strict=True):
            rows, columns = parameter.shape
            step = lr * _scale(rows, columns, group["adjust_lr_fn"])
            parameter.add_(direction if rows <= columns else direction.T, alpha=-step)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalise(
    matrices_NAB: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The quintic Newton-Schulz iteration on a batch of wide matrices (N, A, B), A <= B, in their dtype.

    Singular values end between about 0.7 and 1.2, singular vectors stay.
    """
    a, b, c = coefficients
    x = matrices_NAB / matrices_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _batches(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters with a gradient, by shape up to transposition, in batches of bounded size."""
    by_shape: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape[(*sorted(parameter.shape), parameter.dtype, parameter.device)].append(parameter)
    batches = []
    for equal in by_shape.values():
        size = max(1, _MAX_BATCH_ELEMENTS // equal[0].numel())
        batches += [equal[start : start + size] for start in range(0, len(equal), size)]
    return batches


def _scale(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    """The factor on the learning rate, as torch.optim.Muon documents it."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
