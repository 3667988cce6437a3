"""What a LAHR model is: transformers' configuration of it."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from transformers import LlamaConfig

from .latent import LatentSettings
from .memory import MemorySettings
from .routing import RoutingSettings
from .settings import LahrSettings


class LahrConfig(LlamaConfig):
    """A Llama whose layers may be routed, with a latent block behind them and a memory among them.

    Attributes
    ----------
    routed_layers: one entry a layer: whether tokens are routed around it. It moves with the layers when they
        grow.
    route_every: where `routed_layers` is not given: the last of each so many layers is routed.
    routing, latent, memory: settings of each part (`RoutingSettings`, `LatentSettings`, `MemorySettings`);
        None for `latent` and `memory`: the model has none.
    memory_at: where the memory is read, as a fraction of the layers that lie before it; 0: at the input.
    memory_reads: one entry a layer, filled from `memory_at`: the memory is read before the first one that
        says so, or behind all layers. It moves with the layers: a growth leaves the memory where it was.
    positions: `rope`, or `learned` embeddings.
    """

    model_type = "lahr"

    routed_layers: list[bool] | None = None
    route_every: int | None = None
    routing: dict[str, Any] | None = None
    latent: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    memory_at: float = 0.5
    memory_reads: list[bool] | None = None
    positions: str = "rope"
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.routed_layers is None and self.route_every:
            last = self.route_every - 1
            self.routed_layers = [layer % self.route_every == last for layer in range(self.num_hidden_layers)]
        if self.memory_reads is None and self.memory is not None:
            before = round(self.memory_at * self.num_hidden_layers)
            self.memory_reads = [layer == before for layer in range(self.num_hidden_layers)]

    def slots(self, length: int) -> int:
        """Tokens of a window that a routed layer processes in training: places for them, filled or not."""
        settings = self.routing_settings()
        if settings.router in ("topk", "random"):
            return settings.top_k(length)
        return settings.budget.after(length)

    def memory_before(self) -> int:
        """The layer before which the memory is read; the number of layers: behind all."""
        reads = self.memory_reads or []
        return reads.index(True) if True in reads else self.num_hidden_layers

    def routing_settings(self) -> RoutingSettings:
        """How routed layers choose their tokens."""
        return _settings(RoutingSettings, "routing", self.routing or {})

    def latent_settings(self) -> LatentSettings | None:
        """How tokens are thought about; None: the model has no latent block."""
        return None if self.latent is None else _settings(LatentSettings, "latent", self.latent)

    def memory_settings(self) -> MemorySettings | None:
        """The memory's shape; None: the model has none."""
        return None if self.memory is None else _settings(MemorySettings, "memory", self.memory)

    def is_routed(self, layer: int) -> bool:
        """Whether tokens are routed around a layer."""
        return bool(self.routed_layers) and bool(self.routed_layers[layer])

    def check(self) -> None:
        """Raise ValueError for what cannot be."""
        for settings in (self.routing_settings, self.latent_settings, self.memory_settings):
            settings()  # raises
        for name in ("routed_layers", "memory_reads"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(entries)} entries for {self.num_hidden_layers} layers: give one each"
                )
        if self.routing is not None and self.routed_layers is None:
            raise ValueError("routing is given and no layer is routed: give route_every or routed_layers too")
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"positions is {self.positions!r}: choose rope or learned")
        if not 0 <= self.memory_at <= 1:
            raise ValueError(f"memory_at is {self.memory_at}: a fraction from 0 to 1 is meant")


def _settings(kind: Any, name: str, given: dict[str, Any]) -> Any:
    known = [each.name for each in fields(kind)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; there are {', '.join(known)}")
    return kind(**given)


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
