"""An auxiliary loss that trains under any training loop, and is not part of the loss that is reported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = loss.dtype
        ctx.device = loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=ctx.dtype, device=ctx.device)


def attach_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """`carrier`, unchanged; a backward pass through it also adds the gradient of the scalar `loss`.

    The gradient is that of `loss` itself, whatever factor the loss of the model has: under gradient
    accumulation scale `loss` by one over the number of passes (`set_auxiliary_scale`), and under a gradient
    scaler (float16) by its factor too.
    """
    assert loss.ndim == 0
    return _Attached.apply(carrier, loss)  # type: ignore[return-value]


def set_auxiliary_scale(model: nn.Module, scale: float) -> None:
    """Multiply every auxiliary loss in `model`: one over the forward passes of an optimizer step."""
    for module in model.modules():
        if hasattr(module, "auxiliary_scale"):
            module.auxiliary_scale = scale  # type: ignore[assignment]
