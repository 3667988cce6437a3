"""A decoder layer of transformers' on the tokens that a router chooses: masks, positions, compact cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import CompactLayer, compact_layer
from .ledger import Turn
from .masks import among_slots, present_tokens
from .masks import attention_mask as mask_for
from .one_token import is_one_token, pass_all, pass_one
from .routing import Routing
from .selection import Slots, gather
from .static_cache import StaticCompactLayer

_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


def routed_forward(
    layer: Any,
    routing: Routing,
    layer_idx: int,
    hidden_states: Tensor,
    *,
    implementation: str | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    cache_name: str = "past_key_values",
    token_mask: Tensor | None = None,
    window: int | None = None,
    **kwargs: Any,
) -> Any:
    """A decoder layer of transformers' on the chosen tokens, with their positions, and a compact cache.

    Args:
        layer: its forward function.
        attention_mask: the model's 4-d mask, or None for plain causal attention. Where keys of earlier passes
            are cached, it only says what is padding, where `token_mask` (bool, (B, T)) does not.
        cache_name: the name under which the layer takes the cache.
        window: a token attends to those that are fewer places away; None: to all before it.
        kwargs: the layer's own; tensors with one entry a token are gathered.
    """
    num_tokens, cache, seen = hidden_states.shape[1], None, None
    if past_key_values is not None:
        cache = compact_layer(past_key_values, layer_idx, routing.settings.budget, window)
        seen = cache.get_seq_length() if isinstance(cache, StaticCompactLayer) else None
    present_BT = token_mask if token_mask is not None else present_tokens(attention_mask, num_tokens, seen)
    if present_BT is not None:
        present_BT = present_BT.expand(len(hidden_states), -1)
    layer = _Called(layer, cache_name, past_key_values, kwargs, num_tokens)
    if isinstance(cache, StaticCompactLayer) and is_one_token(routing, hidden_states, cache):

        def run_all(columns_B11C: Tensor) -> Tensor:
            mask = mask_for(columns_B11C, 1, implementation, hidden_states)
            return layer(hidden_states, mask, lambda value: value)

        output_B1D = pass_all(routing, hidden_states, present_BT, cache, run_all)
        return (output_B1D,) if layer.tuples else output_B1D
    if isinstance(cache, CompactLayer) and is_one_token(routing, hidden_states, cache):

        def run_rows(turn: Turn, chosen_A1D: Tensor) -> Tensor:
            return layer(chosen_A1D, turn.mask_A11N, turn.of_rows)

        output_B1D = pass_one(routing, hidden_states, present_BT, cache, run_rows)
        return (output_B1D,) if cache.tuples else output_B1D

    def run(slots: Slots, chosen_BKD: Tensor, columns: Tensor | None) -> Tensor:
        if columns is None and attention_mask is not None:
            columns = among_slots(attention_mask, slots)
        mask = mask_for(columns, chosen_BKD.shape[1], implementation, chosen_BKD)
        return layer(chosen_BKD, mask, lambda value: gather(value, slots))

    output_BTD = routing(layer.forward, hidden_states, present_BT=present_BT, cache=cache, run=run)
    if isinstance(cache, CompactLayer):
        cache.tuples = layer.tuples
    return (output_BTD,) if layer.tuples else output_BTD


class _Called:
    """A layer's forward function with its cache and its other arguments, for some of the tokens."""

    def __init__(
        self, forward: Any, cache_name: str, cache: Cache | None, given: dict[str, Any], num_tokens: int
    ) -> None:
        self.forward, self.cache, self.given, self.num_tokens = (
            forward,
            {cache_name: cache},
            given,
            num_tokens,
        )
        self.tuples = False  # whether it returns its hidden states in one

    def __call__(self, chosen: Tensor, mask: Tensor | None, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Run it on the `chosen` tokens; `pick` finds their entries of a tensor that has one for each."""
        given = {name: self._picked(name, value, pick, chosen.shape[1]) for name, value in self.given.items()}
        output = self.forward(chosen, attention_mask=mask, **self.cache, **given)
        self.tuples = isinstance(output, tuple)
        return output[0] if self.tuples else output

    def _picked(self, name: str, value: Any, pick: Callable[[Tensor], Tensor], count: int) -> Any:
        """An argument for the chosen tokens: positions and rotary tables go with their tokens."""
        if isinstance(value, tuple) and value and all(isinstance(each, Tensor) for each in value):
            return tuple(self._picked(name, each, pick, count) for each in value)
        if not isinstance(value, Tensor):
            return value
        positions = name in ("position_ids", "position_embeddings")
        if positions and value.ndim >= 2 and value.shape[1] == self.num_tokens:
            return pick(value)
        if name == "cache_position":
            return value[:count]
        raise ValueError(
            f"the layer takes a tensor {name!r} of shape {tuple(value.shape)}, and it is not known which of "
            "its entries belong to a token: Mixture-of-Depths does not work on this architecture"
        )


class RoutedLayer(nn.Module):
    """What is mixed into a decoder layer's class: its forward pass runs on the tokens that `routing` chooses.

    The layer keeps its own class behind this one, its tensors keep their names, and hooks and settings stay.
    """

    routing: Routing
    routing_config: Any
    routing_window: int | None
    layer_idx_in_cache: int
    parameter_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For pickle and copy, which cannot find a class that was made on the fly by its name."""
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return _blank_layer, (type(self).__mro__[2],), *state

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(self.parameter_names, args, strict=False)
        cache_name = next((name for name in _CACHE_NAMES if name in kwargs), _CACHE_NAMES[0])
        return routed_forward(
            super().forward,
            self.routing,
            self.layer_idx_in_cache,
            hidden_states,
            implementation=self.routing_config._attn_implementation,
            past_key_values=kwargs.pop(cache_name, None),
            cache_name=cache_name,
            window=self.routing_window,
            **kwargs,
        )


def route_layer(block: nn.Module, routing: Routing, config: Any, layer_idx: int) -> None:
    """Make a decoder layer a routed one, in place.

    Raises
    ------
    ValueError
        If the layer takes no attention mask or no cache, or its attention is neither full nor in a window.
    """
    names = tuple(inspect.signature(block.forward).parameters)
    if "attention_mask" not in names or not set(names) & {*_CACHE_NAMES}:
        raise ValueError(
            f"{type(block).__name__} takes no attention mask or no cache of keys and values: "
            "Mixture-of-Depths does not work on this architecture"
        )
    window = attention_window(config, layer_idx)
    block.routing = routing.train(block.training)  # or a model in use would route as in training
    block.layer_idx_in_cache = layer_idx  # type: ignore[assignment]
    block.routing_config = config
    block.routing_window = window  # type: ignore[assignment]
    block.parameter_names = names[1:]  # type: ignore[assignment]
    block.__class__ = _routed_layer(type(block))


@cache
def _routed_layer(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Routed{plain.__name__}", (RoutedLayer, plain), {})


def _blank_layer(plain: type[nn.Module]) -> nn.Module:
    """A routed layer of a class, without content: pickle fills it."""
    kind = _routed_layer(plain)
    return kind.__new__(kind)


def attention_window(config: Any, layer_idx: int) -> int | None:
    """How far a decoder layer's attention reaches; None: over everything before.

    Raises
    ------
    ValueError
        For other kinds of layers (chunked or linear attention).
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return window if getattr(config, "use_sliding_window", True) else None
    if kinds[layer_idx] not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"layer {layer_idx} is of kind {kinds[layer_idx]!r}: only layers of full_attention and "
            "sliding_attention can be routed; name some with layers="
        )
    return window if kinds[layer_idx] == "sliding_attention" else None
