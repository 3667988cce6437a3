"""aiether: train transformers whose depth is a decision, not a constant.

>>> import aiether
>>> aiether.fit(trainer)  # a Hugging Face Trainer, grown when the geometry of its weights says so
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .geometry import Extrapolator, GeometryMetrics, Trajectory
    from .growth import (
        Family,
        GrowthConfig,
        GrowthController,
        GrowthPlan,
        TrainingState,
        family_of,
        migrate,
    )
    from .integrations import FitResult, GrowthError, GrowthReport, Rewarm, RunFault, RunObserver, fit, grow
    from .toroidal import load, retrofit

__version__ = "0.1.0"

_HOMES = {
    "Extrapolator": "geometry",
    "Family": "growth",
    "FitResult": "integrations",
    "GeometryMetrics": "geometry",
    "GrowthConfig": "growth",
    "GrowthController": "growth",
    "GrowthError": "integrations",
    "GrowthPlan": "growth",
    "GrowthReport": "integrations",
    "Rewarm": "integrations",
    "RunFault": "integrations",
    "RunObserver": "integrations",
    "Trajectory": "geometry",
    "TrainingState": "growth",
    "family_of": "growth",
    "fit": "integrations",
    "grow": "integrations",
    "load": "toroidal",
    "migrate": "growth",
    "retrofit": "toroidal",
}

_PARTS = (
    "adaptive",
    "data",
    "evaluation",
    "geometry",
    "growth",
    "integrations",
    "retrofitting",
    "study",
    "toroidal",
    "training",
)

__all__ = [
    "Extrapolator",
    "Family",
    "FitResult",
    "GeometryMetrics",
    "GrowthConfig",
    "GrowthController",
    "GrowthError",
    "GrowthPlan",
    "GrowthReport",
    "Rewarm",
    "RunFault",
    "RunObserver",
    "TrainingState",
    "Trajectory",
    "family_of",
    "fit",
    "grow",
    "load",
    "migrate",
    "retrofit",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `aiether --help` should not wait for PyTorch.
    if name in _PARTS:
        return import_module(f"aiether.{name}")
    if name in _HOMES:
        return getattr(import_module(f"aiether.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aiether' has no attribute {name!r}")
