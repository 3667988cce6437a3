"""Which tokens of a text each routed layer processes, and how long each token is thought about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .routing import Routing


@dataclass(frozen=True)
class TokenTrace:
    """Where a model's computation went, token by token.

    Attributes
    ----------
    layers: indices of the routed layers.
    processed: for each of them, whether it processed each token.
    iterations: how many latent iterations each token took; empty without a latent block.
    """

    layers: tuple[int, ...]
    processed: tuple[tuple[bool, ...], ...]
    iterations: tuple[int, ...]


@torch.no_grad()
def trace_tokens(model: Any, ids_T: Tensor) -> TokenTrace:
    """One forward pass over a text by the causal rules, as in generation; the model's mode is left as it was.

    Args:
        model: a LAHR model, or a decoder with routed layers.
        ids_T: int64 token ids of one text.
    """
    routings = [module for module in model.modules() if isinstance(module, Routing)]
    training = model.training
    model.eval()
    for routing in routings:
        routing.chosen = []
    try:
        output = model.base_model(input_ids=ids_T[None], use_cache=False)
        processed = []
        for routing in routings:
            assert routing.chosen is not None
            (slots,) = routing.chosen
            row_T = torch.zeros_like(ids_T, dtype=torch.bool)
            row_T[slots.index_BK[0][slots.filled_BK[0]]] = True
            processed.append(tuple(row_T.tolist()))
    finally:
        model.train(training)
        for routing in routings:
            routing.chosen = None
    taken = getattr(output, "iterations", None)
    iterations = () if taken is None else tuple(taken[0].tolist())
    return TokenTrace(tuple(routing.layer_idx for routing in routings), tuple(processed), iterations)
