"""The reference's documented import path of `LayerStateManager`."""

from __future__ import annotations

from .training.layer_states import LayerStateManager

__all__ = ["LayerStateManager"]
