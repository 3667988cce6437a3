"""Depth per token: Mixture-of-Depths, latent reasoning with halting, memory, and the LAHR model of them."""

from __future__ import annotations

from .auxiliary import attach_loss, set_auxiliary_scale
from .config import PARTS, SIZES, LahrCondition, LahrConfig, LahrSettings, lahr_parts
from .halting import exit_probabilities, prior_probabilities
from .latent import LatentReasoning, LatentSettings, Thought
from .memory import MemorySettings, ProductKeyMemory
from .mixture_of_depths import MixtureOfDepths, add_mixture_of_depths, commit_routing
from .model import LahrForCausalLM, LahrModel
from .routing import Routing, RoutingSettings

__all__ = [
    "PARTS",
    "SIZES",
    "LahrCondition",
    "LahrConfig",
    "LahrForCausalLM",
    "LahrModel",
    "LahrSettings",
    "LatentReasoning",
    "LatentSettings",
    "MemorySettings",
    "MixtureOfDepths",
    "ProductKeyMemory",
    "Routing",
    "RoutingSettings",
    "Thought",
    "add_mixture_of_depths",
    "attach_loss",
    "commit_routing",
    "exit_probabilities",
    "lahr_parts",
    "prior_probabilities",
    "set_auxiliary_scale",
]
