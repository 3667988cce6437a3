"""What a LAHR model is: transformers' configuration of it, its conditions and its sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from transformers import LlamaConfig

from .latent import LatentSettings
from .memory import MemorySettings
from .routing import RoutingSettings

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


class LahrConfig(LlamaConfig):
    """A Llama whose layers may be routed, with a latent block behind them and a memory among them.

    Attributes
    ----------
    routed_layers: one entry a layer: whether tokens are routed around it. It moves with the layers when they
        grow.
    routing, latent, memory: settings of each part (`RoutingSettings`, `LatentSettings`, `MemorySettings`);
        None for `latent` and `memory`: the model has none.
    memory_at: where the memory is read, as a fraction of the layers that lie before it; 0: at the input.
    positions: `rope`, or `learned` embeddings.
    """

    model_type = "lahr"

    routed_layers: list[bool] | None = None
    routing: dict[str, Any] | None = None
    latent: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    memory_at: float = 0.5
    positions: str = "rope"

    def routing_settings(self) -> RoutingSettings:
        """How routed layers choose their tokens."""
        return RoutingSettings(**(self.routing or {}))

    def latent_settings(self) -> LatentSettings | None:
        """How tokens are thought about; None: the model has no latent block."""
        return None if self.latent is None else LatentSettings(**self.latent)

    def memory_settings(self) -> MemorySettings | None:
        """The memory's shape; None: the model has none."""
        return None if self.memory is None else MemorySettings(**self.memory)

    def is_routed(self, layer: int) -> bool:
        """Whether tokens are routed around a layer."""
        return bool(self.routed_layers) and bool(self.routed_layers[layer])

    def check(self) -> None:
        """Raise ValueError for what cannot be."""
        for settings in (self.routing_settings, self.latent_settings, self.memory_settings):
            settings()  # raises
        if self.routed_layers is not None and len(self.routed_layers) != self.num_hidden_layers:
            raise ValueError(
                f"routed_layers has {len(self.routed_layers)} entries for {self.num_hidden_layers} layers: "
                "one for each is meant"
            )
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"positions is {self.positions!r}: choose rope or learned")
        if not 0 <= self.memory_at <= 1:
            raise ValueError(f"memory_at is {self.memory_at}: a fraction from 0 to 1 is meant")


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

    def validate(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        if self.lahr_condition not in get_args(LahrCondition):
            raise ValueError(
                f"lahr_condition is {self.lahr_condition!r}: "
                f"choose one of {', '.join(get_args(LahrCondition))}"
            )
        if self.lahr_every < 1:
            raise ValueError(f"lahr_every is {self.lahr_every}: it must be at least 1")
        if self.lahr_memory_lr <= 0:
            raise ValueError(f"lahr_memory_lr is {self.lahr_memory_lr}: it must be greater than 0")
        LahrConfig(num_hidden_layers=self.lahr_every, **lahr_parts(self, self.lahr_every)).check()


def lahr_parts(settings: LahrSettings, n_layer: int) -> dict[str, Any]:
    """The keys of a `LahrConfig` of `n_layer` layers that a run's settings decide."""
    mod, latent, memory = settings.parts()
    routed = [mod and index % settings.lahr_every == settings.lahr_every - 1 for index in range(n_layer)]
    routing = RoutingSettings(
        capacity=settings.lahr_capacity,
        router=settings.lahr_router,
        predictor=settings.lahr_predictor,
        slack=settings.lahr_slack,
        burst=settings.lahr_burst,
    )
    thought = LatentSettings(
        iterations=settings.lahr_iterations,
        halting=settings.lahr_halting,
        halt_q=settings.lahr_halt_q,
        prior=settings.lahr_prior,
        kl_weight=settings.lahr_kl_weight,
    )
    slots = MemorySettings(
        keys=settings.lahr_memory_keys, heads=settings.lahr_memory_heads, top_k=settings.lahr_memory_top_k
    )
    return {
        "routed_layers": routed,
        "routing": asdict(routing) if mod else None,
        "latent": asdict(thought) if latent else None,
        "memory": asdict(slots) if memory else None,
        "memory_at": settings.lahr_memory_at,
        "positions": settings.lahr_positions,
    }
