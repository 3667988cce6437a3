"""Which decoders can be given toroidal attention, and where their attention is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .settings import ToroidalSettings


def attention_modules(model: nn.Module, layers: Sequence[int]) -> list[Any]:
    """The attention module of each of the layers.

    Raises
    ------
    ValueError
        If a layer has none, or several.
    """
    found: dict[int, list[Any]] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__ and hasattr(module, "config"):
            found.setdefault(index, []).append(module)
    missing = [index for index in layers if len(found.get(index, ())) != 1]
    if missing:
        there = sorted(index for index, modules in found.items() if len(modules) == 1)
        raise ValueError(
            f"{type(model).__name__} has no single attention module in the layers {missing}: toroidal "
            f"attention works {f'in {there} alone' if there else 'not on this architecture'}"
        )
    return [found[index][0] for index in layers]


def check_conversion(
    model: PreTrainedModel, layers: Sequence[int] | None, settings: ToroidalSettings
) -> None:
    """Raises ValueError if these layers cannot be converted so; None: the layers are not chosen yet."""
    depth = _depth(model)
    chosen = range(depth) if layers is None else layers
    if not chosen or len(set(chosen)) != len(chosen) or any(not 0 <= index < depth for index in chosen):
        raise ValueError(f"layers is {list(chosen)}: name each of some from 0 to {depth - 1} once")
    check_architecture(model)
    for attention in attention_modules(model, chosen):
        settings.check_head(head_dim_of(attention))
        if layers is not None and settings.shuffled and has_window(attention.config, attention.layer_idx):
            raise ValueError(
                f"layer {attention.layer_idx} has a sliding window, whose cache does not know where on the "
                "ring a token stands: leave shuffled out, or choose other layers"
            )


def head_dim_of(attention: Any) -> int:
    """Of the heads of a layer's attention."""
    config = attention.config
    return getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_window(config: Any, layer: int) -> bool:
    """Whether a layer sees a sliding window alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] == "sliding_attention"
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _depth(model: PreTrainedModel) -> int:
    depth = getattr(model.config, "num_hidden_layers", None)
    if depth is None:
        raise ValueError(
            f"the configuration of {type(model).__name__} names no layers (num_hidden_layers), as where a "
            "decoder is a part of a larger model: retrofit the decoder itself"
        )
    return depth


def check_architecture(model: PreTrainedModel) -> None:
    """Raises ValueError if the model's attention cannot be taken over."""
    check_in_memory(model)
    config: Any = model.config
    reasons = {
        "it attends to later tokens (is_causal)": not _is_causal(model),
        "its keys and values have sizes of their own (kv_lora_rank, v_head_dim)": any(
            getattr(config, name, None) for name in ("kv_lora_rank", "v_head_dim")
        ),
        "it has an encoder": config.is_encoder_decoder or getattr(config, "add_cross_attention", False),
        "its scores are capped (attn_logit_softcapping)": bool(
            getattr(config, "attn_logit_softcapping", None)
        ),
        "its attention is not called through transformers' attention interface": (
            not model._supports_attention_backend or not model._supports_sdpa
        ),
        "it upcasts or reorders its scores (reorder_and_upcast_attn)": bool(
            getattr(config, "reorder_and_upcast_attn", False)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"toroidal attention does not work on {type(model).__name__}: {reason}; take another "
                "architecture"
            )


def check_in_memory(model: PreTrainedModel) -> None:
    """Raises ValueError if weights are offloaded: they would be neither compared nor beside their terms."""
    if getattr(model, "hf_device_map", None) and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"weights of the {type(model).__name__} are offloaded (device_map): toroidal attention needs "
            "them in memory; load the model without offloading, or in a smaller type (dtype)"
        )


def _is_causal(model: PreTrainedModel) -> bool:
    """By its configuration, and by each attention module, of which an encoder's says so alone."""
    modules = [m for m in model.modules() if "Attention" in type(m).__name__]
    return all(getattr(each, "is_causal", True) is not False for each in (model.config, *modules))
