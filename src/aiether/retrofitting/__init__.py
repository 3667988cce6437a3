"""Moving a trained model toward toroidal attention: convert, transfer, tune, write.

Names are imported when they are asked for: settings alone need neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TuneConfig
    from .inputs import RetrofitJob
    from .job import Retrofitted, run_retrofit
    from .loop import Tuned, tune
    from .losses import mean_divergence, transfer_loss, tuning_loss
    from .memory import MemoryEstimate, estimate_memory
    from .suggest import LayerCosts, cheapest, compare_layers, layer_costs

_HOMES = {
    "config": ("TuneConfig",),
    "inputs": ("RetrofitJob",),
    "job": ("Retrofitted", "run_retrofit"),
    "losses": ("mean_divergence", "transfer_loss", "tuning_loss"),
    "memory": ("MemoryEstimate", "estimate_memory"),
    "suggest": ("LayerCosts", "cheapest", "compare_layers", "layer_costs"),
    "loop": ("Tuned", "tune"),
}

__all__ = [
    "LayerCosts",
    "MemoryEstimate",
    "RetrofitJob",
    "Retrofitted",
    "TuneConfig",
    "Tuned",
    "cheapest",
    "compare_layers",
    "estimate_memory",
    "layer_costs",
    "mean_divergence",
    "run_retrofit",
    "transfer_loss",
    "tune",
    "tuning_loss",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
