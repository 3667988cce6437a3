"""Attention on a torus: positions on a ring of fixed period, heads split into platters that see each other.

Names are imported when they are asked for: settings alone need neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architecture import attention_modules, check_conversion
    from .attention import Places, toroidal_attention
    from .decoders import (
        register_toroidal,
        restore,
        retrofit,
        set_backend,
        set_progress,
        torus_terms,
    )
    from .kernels import attend_eager, attend_flash, merge
    from .module import ToroidalAttention
    from .over_ranks import sharded
    from .reference import reference_attention
    from .ring import ring_attention, toroidal_ring_attention
    from .settings import ToroidalSettings
    from .shards import SequenceShards
    from .storage import is_toroidal, load
    from .terms import Terms, TorusTerms

_HOMES = {
    "architecture": ("attention_modules", "check_conversion"),
    "attention": ("Places", "toroidal_attention"),
    "decoders": (
        "register_toroidal",
        "restore",
        "retrofit",
        "set_backend",
        "set_progress",
        "torus_terms",
    ),
    "kernels": ("attend_eager", "attend_flash", "merge"),
    "module": ("ToroidalAttention",),
    "reference": ("reference_attention",),
    "ring": ("ring_attention", "toroidal_ring_attention"),
    "settings": ("ToroidalSettings",),
    "over_ranks": ("sharded",),
    "shards": ("SequenceShards",),
    "storage": ("is_toroidal", "load"),
    "terms": ("Terms", "TorusTerms"),
}

__all__ = [
    "Places",
    "SequenceShards",
    "Terms",
    "ToroidalAttention",
    "ToroidalSettings",
    "TorusTerms",
    "attend_eager",
    "attend_flash",
    "attention_modules",
    "check_conversion",
    "is_toroidal",
    "load",
    "merge",
    "reference_attention",
    "register_toroidal",
    "restore",
    "retrofit",
    "ring_attention",
    "set_backend",
    "set_progress",
    "sharded",
    "toroidal_attention",
    "toroidal_ring_attention",
    "torus_terms",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
