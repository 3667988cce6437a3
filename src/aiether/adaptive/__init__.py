"""Depth per token: Mixture-of-Depths, latent reasoning with halting, memory, and the LAHR model of them.

Names are imported when they are asked for: settings alone need neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auxiliary import attach_loss, set_auxiliary_scale
    from .config import LahrConfig, lahr_parts
    from .decoders import add_mixture_of_depths, load_mixture_of_depths
    from .figures import compute_figures, reset_compute_figures
    from .halting import exit_probabilities, prior_probabilities
    from .inference import set_halt_q
    from .latent import LatentReasoning, LatentSettings, Thought
    from .memory import MemorySettings, ProductKeyMemory
    from .mixture_of_depths import MixtureOfDepths, commit_routing
    from .model import LahrForCausalLM, LahrModel
    from .pauses import insert_pauses
    from .routing import Routing, RoutingSettings
    from .second_stage import exit_losses, renew_halting_head, train_halting_head
    from .settings import PARTS, SIZES, LahrCondition, LahrSettings
    from .trace import TokenTrace, trace_tokens

_HOMES = {
    "auxiliary": ("attach_loss", "set_auxiliary_scale"),
    "config": ("LahrConfig", "lahr_parts"),
    "decoders": ("add_mixture_of_depths", "load_mixture_of_depths"),
    "figures": ("compute_figures", "reset_compute_figures"),
    "halting": ("exit_probabilities", "prior_probabilities"),
    "inference": ("set_halt_q",),
    "latent": ("LatentReasoning", "LatentSettings", "Thought"),
    "memory": ("MemorySettings", "ProductKeyMemory"),
    "mixture_of_depths": ("MixtureOfDepths", "commit_routing"),
    "model": ("LahrForCausalLM", "LahrModel"),
    "pauses": ("insert_pauses",),
    "routing": ("Routing", "RoutingSettings"),
    "trace": ("TokenTrace", "trace_tokens"),
    "second_stage": ("exit_losses", "renew_halting_head", "train_halting_head"),
    "settings": ("PARTS", "SIZES", "LahrCondition", "LahrSettings"),
}

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
    "TokenTrace",
    "add_mixture_of_depths",
    "attach_loss",
    "commit_routing",
    "compute_figures",
    "exit_losses",
    "exit_probabilities",
    "insert_pauses",
    "lahr_parts",
    "load_mixture_of_depths",
    "prior_probabilities",
    "renew_halting_head",
    "reset_compute_figures",
    "set_auxiliary_scale",
    "set_halt_q",
    "trace_tokens",
    "train_halting_head",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
