"""Mixture-of-Depths for any block, and for the layers of any Hugging Face decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import CompactLayer, own_layer
from .masks import attention_mask, present_tokens
from .routing import Routing, RoutingSettings
from .selection import Slots, gather


class MixtureOfDepths(nn.Module):
    """A block that processes a share of the tokens; the others pass it by.

    Args:
        block: f(hidden_BKD) -> (B, K, D), its residual connection included. Attention inside it must be
            causal and take its positions from the hidden states; for a Hugging Face layer use
            `add_mixture_of_depths`.
        hidden_size: D.
        layer: a number that differs from layer to layer (for the random router).

    Call `commit_routing(model)` once before each training step: thresholds and random numbers move then.
    """

    def __init__(
        self, block: nn.Module, hidden_size: int, settings: RoutingSettings | None = None, *, layer: int = 0
    ) -> None:
        super().__init__()
        self.block = block
        self.routing = Routing(hidden_size, settings or RoutingSettings(), layer)

    def forward(self, hidden_BTD: Tensor, present_BT: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.routing(self.block, hidden_BTD, present_BT=present_BT)


class RoutedLayer(nn.Module):
    """What is mixed into a decoder layer's class: its forward pass runs on the tokens that `routing` chooses.

    The layer keeps its own class behind this one, its tensors keep their names, and hooks and settings stay.
    """

    routing: Routing
    routing_config: Any
    layer_idx_in_cache: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise TypeError(f"{type(self).__name__} takes everything but the hidden states by name")
        kwargs["implementation"] = self.routing_config._attn_implementation
        return routed_forward(super().forward, self.routing, self.layer_idx_in_cache, hidden_states, **kwargs)


def routed_forward(
    layer: Any,
    routing: Routing,
    layer_idx: int,
    hidden_states: Tensor,
    *,
    implementation: str | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    token_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A decoder layer of transformers' on the chosen tokens, with their positions, and a compact cache.

    Args:
        layer: its forward function.
        attention_mask: the model's 4-d mask, which says what is padding where `token_mask` (bool, (B, T))
            does not.
        kwargs: the layer's own; tensors with one entry a token are gathered.
    """
    num_tokens = hidden_states.shape[1]
    present_BT = token_mask if token_mask is not None else present_tokens(attention_mask, num_tokens)
    if present_BT is not None:
        present_BT = present_BT.expand(len(hidden_states), -1)
    cache = None
    if past_key_values is not None:
        cache = own_layer(past_key_values, layer_idx, CompactLayer, routing.settings.budget)

    def run(slots: Slots, chosen_BKD: Tensor, columns: Tensor | None) -> Tensor:
        given = {name: _of_slots(name, value, slots, num_tokens) for name, value in kwargs.items()}
        mask = _mask(columns, chosen_BKD, implementation)
        output = layer(chosen_BKD, attention_mask=mask, past_key_values=past_key_values, **given)
        return output[0] if isinstance(output, tuple) else output

    return routing(layer, hidden_states, present_BT=present_BT, cache=cache, run=run)


def _mask(columns: Tensor | None, chosen_BKD: Tensor, implementation: str | None) -> Tensor | None:
    return attention_mask(columns, chosen_BKD.shape[1], implementation, chosen_BKD)


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


def add_mixture_of_depths(
    model: PreTrainedModel,
    *,
    every: int = 2,
    capacity: float = 0.125,
    layers: tuple[int, ...] | None = None,
    settings: RoutingSettings | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Route tokens around layers of a Hugging Face decoder, in place; its weights and their names stay.

    Args:
        every: the last of each `every` layers is routed; `layers` names them instead.
        capacity: share of the tokens that a routed layer processes.
        settings: everything about routing at once; else `capacity` and `options` (see `RoutingSettings`).

    Raises
    ------
    ValueError
        If the model's blocks cannot be found, a layer is routed already, or there is nothing to route.
    """
    settings = settings or RoutingSettings(capacity=capacity, **options)
    blocks = _decoder_layers(model)
    chosen = tuple(range(every - 1, len(blocks), every)) if layers is None else layers
    if every < 1 or not chosen or any(not 0 <= index < len(blocks) for index in chosen):
        raise ValueError(
            f"every={every}, layers={layers} of {len(blocks)} layers: name some from 0 to {len(blocks) - 1}"
        )
    for index in chosen:
        block = blocks[index]
        if isinstance(block, RoutedLayer):
            raise ValueError(f"layer {index} is routed already: begin from the model as it was loaded")
        routing = Routing(model.config.hidden_size, settings, index)
        reference = next(block.parameters())
        block.routing = routing.to(reference.device)
        block.layer_idx_in_cache = index  # type: ignore[assignment]
        block.routing_config = model.config  # type: ignore[assignment]
        block.__class__ = type(f"Routed{type(block).__name__}", (RoutedLayer, type(block)), {})
    model.register_forward_pre_hook(_commit_before)
    return model


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {model.config.num_hidden_layers} layers: wrap "
            "a layer with aiether.adaptive.MixtureOfDepths instead"
        )
    return lists[0]


def _commit_before(model: nn.Module, args: Any) -> None:
    if model.training and torch.is_grad_enabled():
        commit_routing(model)


def commit_routing(model: nn.Module) -> None:
    """Let every routed layer and latent block of `model` move on to the next training pass."""
    for module in model.modules():
        if hasattr(module, "commit"):
            module.commit()  # type: ignore[operator]
