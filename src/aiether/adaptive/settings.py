"""What a run can be told about a LAHR model: its conditions, its sizes, and every setting of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LahrCondition = Literal[
    "full", "no_mod", "no_latent", "no_memory", "mod_only", "latent_only", "memory_only", "baseline"
]

PARTS: dict[str, tuple[bool, bool, bool]] = {
    "full": (True, True, True),
    "no_mod": (False, True, True),
    "no_latent": (True, False, True),
    "no_memory": (True, True, False),
    "mod_only": (True, False, False),
    "latent_only": (False, True, False),
    "memory_only": (False, False, True),
    "baseline": (False, False, False),
}
"""Condition -> whether it has Mixture-of-Depths, latent reasoning, memory."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "context_length": 256},
    "small": {"n_layer": 8, "n_embd": 256, "n_head": 8, "context_length": 512},
    "medium": {"n_layer": 12, "n_embd": 512, "n_head": 8, "context_length": 1024},
    "base": {"n_layer": 12, "n_embd": 768, "n_head": 12, "context_length": 1024},
}
"""Size -> its shape; what it comes to in parameters depends on the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class LahrSettings:
    """A run's settings of a LAHR model, as `--lahr.NAME`; each is `lahr_NAME` in a configuration.

    Attributes
    ----------
    lahr_condition: which parts the model has; `lahr_mod`, `lahr_latent` and `lahr_memory` say so one by one.
    lahr_every: the last of each so many layers is routed.
    lahr_capacity, lahr_router, lahr_predictor, lahr_slack, lahr_burst: see `RoutingSettings`.
    lahr_iterations, lahr_halting, lahr_halt_q, lahr_prior, lahr_kl_weight: see `LatentSettings`.
    lahr_memory_keys, lahr_memory_heads, lahr_memory_top_k, lahr_memory_at: see `MemorySettings`,
        `LahrConfig`.
    lahr_memory_lr: learning rate of the memory's values, times `lr`.
    lahr_positions: rotary or learned.
    """

    lahr_condition: LahrCondition = "full"
    lahr_mod: bool | None = None
    lahr_latent: bool | None = None
    lahr_memory: bool | None = None
    lahr_every: int = 2
    lahr_capacity: float = 0.125
    lahr_router: Literal["topk", "threshold", "random", "stride"] = "topk"
    lahr_predictor: Literal["router", "head"] = "router"
    lahr_slack: float = 1.5
    lahr_burst: int = 8
    lahr_iterations: int = 4
    lahr_halting: Literal["learned", "fixed", "random", "change"] = "learned"
    lahr_halt_q: float = 0.5
    lahr_prior: Literal["uniform", "geometric"] = "uniform"
    lahr_kl_weight: float = 0.01
    lahr_memory_keys: int = 32
    lahr_memory_heads: int = 4
    lahr_memory_top_k: int = 8
    lahr_memory_at: float = 0.5
    lahr_memory_lr: float = 1.0
    lahr_positions: Literal["rope", "learned"] = "rope"

    def parts(self) -> tuple[bool, bool, bool]:
        """Whether the model has Mixture-of-Depths, latent reasoning, memory."""
        given = (self.lahr_mod, self.lahr_latent, self.lahr_memory)
        named = PARTS[self.lahr_condition]
        return tuple(b if a is None else a for a, b in zip(given, named, strict=True))  # type: ignore[return-value]

    def validate_lahr(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        if self.lahr_condition not in get_args(LahrCondition):
            raise ValueError(
                f"lahr_condition is {self.lahr_condition!r}: "
                f"choose one of {', '.join(get_args(LahrCondition))}"
            )
        if self.lahr_every < 1:
            raise ValueError(f"lahr_every is {self.lahr_every}: it must be at least 1")
        if not self.lahr_memory_lr > 0:
            raise ValueError(f"lahr_memory_lr is {self.lahr_memory_lr}: it must be greater than 0")
        from .config import LahrConfig, lahr_parts  # transformers, which takes seconds

        LahrConfig(num_hidden_layers=self.lahr_every, **lahr_parts(self, self.lahr_every)).check()
