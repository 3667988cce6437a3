"""Training in stages, its run folder, its display and its report.

`train_with_hf_trainer` is the reference's documented import path. Its home is `aiether.compat` on the top
floor, so this package answers for the name only when someone asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiether.compat import train_with_hf_trainer

__all__ = ["train_with_hf_trainer"]


def __getattr__(name: str) -> Any:
    if name == "train_with_hf_trainer":
        from aiether.compat import train_with_hf_trainer

        return train_with_hf_trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
