"""What may be chosen when a trained model is used: how long it thinks."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .latent import LatentReasoning


def set_halt_q(model: nn.Module, halt_q: float) -> None:
    """Let tokens stop at the first iteration at which they have stopped with at least this probability.

    0: after one iteration; 1: after all of them.

    Raises
    ------
    ValueError
        If the model has no latent block with a halting head, or `halt_q` is no probability.
    """
    blocks = [module for module in model.modules() if isinstance(module, LatentReasoning)]
    if not any(block.settings.learns for block in blocks):
        raise ValueError(
            f"halt_q is {halt_q}, and {type(model).__name__} has no latent block that learned to halt: "
            "leave it out for this model"
        )
    for block in blocks:
        block.settings = replace(block.settings, halt_q=halt_q)
    config = getattr(model, "config", None)
    if getattr(config, "latent", None) is not None:
        config.latent = {**config.latent, "halt_q": halt_q}  # type: ignore[union-attr]
