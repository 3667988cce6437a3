"""What a retrofitted model learns from the one that it was: each layer's attention, then the distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiether.evaluation.compare import token_divergences
from aiether.toroidal import attention_modules

from .before import as_before


def transfer_loss(model: Any, ids_BT: Tensor, originals: Mapping[str, Tensor]) -> Tensor:
    """How far each converted layer's attention output is from what it was, float32 scalar.

    The mean over layers of the squared error over the squared output, each layer on the inputs that it had in
    the model as it was: layers learn side by side and errors do not add up (LoLCATs, arXiv:2410.10254).
    """
    layers = attention_modules(model, model.config.toroidal["layers"])
    seen: dict[int, tuple[Any, Any, Tensor]] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(as_before(model, originals))
        for index, layer in enumerate(layers):

            def keep(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                seen[index] = args, kwargs, output[0]

            stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    taught = [seen[index] for index in range(len(layers))]
    now = [layer(*args, **kwargs)[0] for layer, (args, kwargs, _) in zip(layers, taught, strict=True)]
    return relative_error([expected for _, _, expected in taught], now)


def tuning_loss(
    model: Any,
    ids_BT: Tensor,
    originals: Mapping[str, Tensor],
    *,
    kl_weight: float,
    hidden_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token cross-entropy, and the divergence from the model as it was; both in nats per token.

    Returns (1 - w) cross-entropy + w KL(before || now) + `hidden_weight` times `relative_error`, and the
    three by name, as far as they were computed.
    """
    hidden = hidden_weight > 0
    now = model(input_ids=ids_BT, use_cache=False, output_hidden_states=hidden)
    logits = now.logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    parts = {"loss": loss.detach()}
    if kl_weight == 0 and not hidden:
        return loss, parts
    with torch.no_grad(), as_before(model, originals):
        before = model(input_ids=ids_BT, use_cache=False, output_hidden_states=hidden)
    total = (1 - kl_weight) * loss
    if kl_weight > 0:
        divergence = mean_divergence(before.logits[:, :-1], logits)
        total, parts["divergence"] = total + kl_weight * divergence, divergence.detach()
    if hidden:
        first = min(model.config.toroidal["layers"]) + 1  # the embedding stands before the layers
        error = relative_error(before.hidden_states[first:], now.hidden_states[first:])
        total, parts["hidden"] = total + hidden_weight * error, error.detach()
    return total, parts


def relative_error(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """Squared error over squared size of states (B, T, C), the mean over layers, float32 scalar.

    States that were all 0, as of layers that growth has just added, are compared by their error alone.
    """
    errors = []
    for expected, found in zip(before, now, strict=True):
        size = expected.float().square().mean()
        error = (found.float() - expected.float()).square().mean()
        errors.append(error / torch.where(size > 0, size, 1))
    return torch.stack(errors).mean()


def mean_divergence(before_BTV: Tensor, now_BTV: Tensor) -> Tensor:
    """KL(before || now) in nats, mean over tokens, float32."""
    return token_divergences(before_BTV, now_BTV).mean()
