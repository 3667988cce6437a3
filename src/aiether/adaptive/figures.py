"""What tokens cost in a model: realised capacity, iterations, use of the memory."""

from __future__ import annotations

import torch
from torch import nn

from .latent import LatentReasoning
from .memory import ProductKeyMemory
from .routing import FIGURES, Routing


def reset_compute_figures(model: nn.Module) -> None:
    """Begin to count what tokens cost; counting goes on until `compute_figures`."""
    for module in model.modules():
        if isinstance(module, Routing | LatentReasoning):
            module.figures.zero_()
            module.counting = True
        elif isinstance(module, ProductKeyMemory):
            module.reset_usage()
            module.counting = True


def compute_figures(model: nn.Module) -> dict[str, float]:
    """What was counted since `reset_compute_figures`, padding aside.

    `capacity`: share of the tokens that routed layers processed. `capacity_dropped`: of those that the causal
    rule wanted, the share for which there was no room. `router_precision`, `router_recall`: of the causal
    rule against the k highest scores of each sequence. `iterations`: their mean. `memory_used`,
    `memory_dead`, `memory_entropy`: see `ProductKeyMemory.usage_figures`.
    """
    figures: dict[str, float] = {}
    routed = [module for module in model.modules() if isinstance(module, Routing)]
    if routed:
        counts = dict(zip(FIGURES, torch.stack([m.figures for m in routed]).sum(0).tolist(), strict=True))
        figures["capacity"] = counts["processed"] / max(1, counts["tokens"])
        dropped = max(0, counts["wanted"] - counts["processed"])
        figures["capacity_dropped"] = dropped / max(1, counts["wanted"])
        if routed[0].settings.learned:
            figures["router_precision"] = counts["agreed"] / max(1, counts["wanted"])
            figures["router_recall"] = counts["agreed"] / max(1, counts["top_k"])
    for module in model.modules():
        if isinstance(module, LatentReasoning):
            tokens, iterations = module.figures.tolist()
            figures["iterations"] = iterations / max(1, tokens)
        if isinstance(module, ProductKeyMemory):
            figures |= module.usage_figures()
        if hasattr(module, "counting"):
            module.counting = False  # type: ignore[assignment]
    return figures
