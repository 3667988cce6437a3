"""A decoder layer of transformers' on the tokens that a router chooses: masks, positions, compact cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import CompactLayer, own_layer
from .masks import among_slots, present_tokens
from .masks import attention_mask as mask_for
from .routing import Routing
from .selection import Slots, gather

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
    num_tokens = hidden_states.shape[1]
    present_BT = token_mask if token_mask is not None else present_tokens(attention_mask, num_tokens)
    if present_BT is not None:
        present_BT = present_BT.expand(len(hidden_states), -1)
    cache = None
    if past_key_values is not None:
        cache = own_layer(past_key_values, layer_idx, CompactLayer, routing.settings.budget, window)
    tuples = False

    def run(slots: Slots, chosen_BKD: Tensor, columns: Tensor | None) -> Tensor:
        nonlocal tuples
        given = {name: _of_slots(name, value, slots, num_tokens) for name, value in kwargs.items()}
        if columns is None and attention_mask is not None:
            columns = among_slots(attention_mask, slots)
        given["attention_mask"] = mask_for(columns, chosen_BKD.shape[1], implementation, chosen_BKD)
        output = layer(chosen_BKD, **{cache_name: past_key_values}, **given)
        tuples = isinstance(output, tuple)
        return output[0] if tuples else output

    output_BTD = routing(layer, hidden_states, present_BT=present_BT, cache=cache, run=run)
    return (output_BTD,) if tuples else output_BTD


def _of_slots(name: str, value: Any, slots: Slots, num_tokens: int) -> Any:
    """A layer's argument for the chosen tokens: positions and rotary tables go with their tokens."""
    if isinstance(value, tuple) and value and all(isinstance(each, Tensor) for each in value):
        return tuple(_of_slots(name, each, slots, num_tokens) for each in value)
    if not isinstance(value, Tensor):
        return value
    if name in ("position_ids", "position_embeddings") and value.ndim >= 2 and value.shape[1] == num_tokens:
        return gather(value, slots)
    if name == "cache_position":
        return value[: slots.index_BK.shape[1]]
    raise ValueError(
        f"the layer takes a tensor {name!r} of shape {tuple(value.shape)}, and it is not known which of its "
        "entries belong to a token: Mixture-of-Depths does not work on this architecture"
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
    own: dict[str, Any] = {"parameter_names": names[1:]}
    block.routing = routing.train(block.training)  # or a model in use would route as in training
    block.layer_idx_in_cache = layer_idx  # type: ignore[assignment]
    block.routing_config = config
    block.routing_window = window  # type: ignore[assignment]
    block.__class__ = type(f"Routed{type(block).__name__}", (RoutedLayer, type(block)), own)


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
