"""Mixture-of-Depths around any block."""

from __future__ import annotations

from torch import Tensor, nn

from .latent import LatentReasoning
from .routing import Routing, RoutingSettings


class MixtureOfDepths(nn.Module):
    """A block that processes a share of the tokens; the others pass it by.

    Args:
        block: f(hidden_BKD) -> (B, K, D), its residual connection included. Attention inside it must be
            causal and take its positions from the hidden states; for a Hugging Face layer use
            `add_mixture_of_depths`.
        hidden_size: D.
        layer: a number that differs from layer to layer (for the random router).

    Call `commit_routing(model)` once before each training step: thresholds and random numbers move then.
    """

    def __init__(
        self, block: nn.Module, hidden_size: int, settings: RoutingSettings | None = None, *, layer: int = 0
    ) -> None:
        super().__init__()
        self.block = block
        self.routing = Routing(hidden_size, settings or RoutingSettings(), layer)

    def forward(self, hidden_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.routing(self.block, hidden_BTD, present_BT=present_BT)


def commit_routing(model: nn.Module) -> None:
    """Let every routed layer and latent block of `model` move on to the next training pass."""
    for module in model.modules():
        if isinstance(module, Routing | LatentReasoning):
            module.commit()
