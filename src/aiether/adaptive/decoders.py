"""Mixture-of-Depths on a Hugging Face decoder: added in place, saved with the model, loaded with it again.

A routed model has a class and a model type of its own, so that nothing loads its folder as the plain model
and drops the routers without a word.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .config import LahrConfig
from .figures import compute_figures, reset_compute_figures
from .mixture_of_depths import commit_routing
from .routed_layer import route_layer
from .routing import KEPT_IN_FP32, Routing, RoutingSettings

_SUFFIX = "_mixture_of_depths"


def add_mixture_of_depths(
    model: PreTrainedModel,
    *,
    every: int = 2,
    capacity: float | None = None,
    layers: tuple[int, ...] | None = None,
    settings: RoutingSettings | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Route tokens around layers of a Hugging Face decoder, in place; its weights and their names stay.

    `model.save_pretrained(path)` saves the routers too; `load_mixture_of_depths(path)` loads it again.

    Args:
        every: the last of each `every` layers is routed; `layers` names them instead.
        capacity: share of the tokens that a routed layer processes; None: 0.125.
        settings: everything about routing at once; else `capacity` and `options` (see `RoutingSettings`).

    Whatever the capacity, a routed layer adds what it changes times the sigmoid of its router's score, about
    a half before training: the model has to be tuned afterwards.

    Raises
    ------
    ValueError
        If there is nothing to route, layers are routed already, or the architecture's attention cannot do
        with some of the tokens.
    """
    given = {**options, **({} if capacity is None else {"capacity": capacity})}
    if settings is not None and given:
        raise ValueError(f"settings are given whole, and {', '.join(given)} beside them: give one of the two")
    settings = settings or RoutingSettings(**given)
    depth = len(_decoder_layers(model))
    chosen = layers if layers is not None else range(every - 1, depth, every) if every > 0 else ()
    if not chosen or any(not 0 <= index < depth for index in chosen):
        raise ValueError(f"every={every}, layers={layers} of {depth} layers: name some from 0 to {depth - 1}")
    if isinstance(model, RoutedDecoder):
        raise ValueError("the model has routed layers already: begin from the model as it was before")
    routed = [index in chosen for index in range(depth)]
    _check(model, routed)
    model_class, config_class = _routed_classes(type(model))
    reference = next(model.parameters())
    _route(model, routed, settings, reference.device)
    model.config.__class__ = config_class
    model.config.routed_layers, model.config.routing = routed, asdict(settings)
    model.__class__ = model_class
    model.config.architectures = [model_class.__name__]
    return model


def load_mixture_of_depths(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A routed model from a folder that its `save_pretrained` wrote; `kwargs` are those of `from_pretrained`.

    After it, transformers' Auto classes know this kind of model too, for as long as the process runs.

    Raises
    ------
    ValueError
        If the folder holds another kind of model.
    """
    config, _ = PreTrainedConfig.get_config_dict(path)
    model_class = _routed_class_of(config.get("model_type"))
    if model_class is None:
        raise ValueError(
            f"{path} holds a model of type {config.get('model_type')!r}, without Mixture-of-Depths: load it "
            "with transformers and call add_mixture_of_depths on it"
        )
    return model_class.from_pretrained(path, **kwargs)  # type: ignore[attr-defined]


def register_mixture_of_depths(model_type: object) -> bool:
    """Whether a model type is a decoder's with routed layers; transformers' Auto classes then know it."""
    return _routed_class_of(model_type) is not None


def _routed_class_of(model_type: object) -> type[PreTrainedModel] | None:
    plain = str(model_type).removesuffix(_SUFFIX)
    if plain == model_type or plain not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[plain]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return _routed_classes(MODEL_FOR_CAUSAL_LM_MAPPING[config_class])[0]


class RoutedDecoder:
    """What is mixed into a model's class."""

    _keep_in_fp32_modules_strict = KEPT_IN_FP32
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _check(self, config.routed_layers)  # type: ignore[arg-type]
        _route(self, config.routed_layers, RoutingSettings(**config.routing), None)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For pickle and copy, which cannot find a class that was made on the fly by its name."""
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return _blank_model, (type(self).__mro__[2],), *state

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Routing):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def reset_compute_figures(self) -> None:
        """Begin to count what tokens cost; counting goes on until `compute_figures`."""
        reset_compute_figures(self)  # type: ignore[arg-type]

    def compute_figures(self) -> dict[str, float]:
        """What was counted since `reset_compute_figures`: the realised capacity, and the predictor's work."""
        return compute_figures(self)  # type: ignore[arg-type]


@cache
def _routed_classes(
    model_class: type[PreTrainedModel],
) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """The classes of a model's routed form and its configuration, known to transformers' Auto classes."""
    plain: Any = model_class.config_class
    model_type = plain.model_type + _SUFFIX

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = plain.__reduce_ex__(self, max(2, protocol))
        return _blank_config, (model_class,), *state

    added = {"model_type": model_type, "routed_layers": None, "routing": None, "__reduce_ex__": reduce}
    annotations = {"routed_layers": list[bool] | None, "routing": dict[str, Any] | None}
    config_class = type(
        f"MixtureOfDepths{plain.__name__}", (plain,), {**added, "__annotations__": annotations}
    )
    routed_class: Any = type(
        f"MixtureOfDepths{model_class.__name__}",
        (RoutedDecoder, model_class),
        {"config_class": config_class, "__module__": __name__},
    )
    AutoConfig.register(model_type, config_class, exist_ok=True)
    if plain in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[plain] is model_class:
        AutoModelForCausalLM.register(config_class, routed_class, exist_ok=True)
    renamed = get_checkpoint_conversion_mapping(plain.model_type)
    if renamed is not None:
        register_checkpoint_conversion_mapping(model_type, renamed, overwrite=True)
    return routed_class, config_class


def _blank_model(plain: type[PreTrainedModel]) -> PreTrainedModel:
    """A routed model of a class, without content: pickle fills it."""
    routed_class, _ = _routed_classes(plain)
    return routed_class.__new__(routed_class)


def _blank_config(plain: type[PreTrainedModel]) -> PreTrainedConfig:
    _, config_class = _routed_classes(plain)
    return config_class.__new__(config_class)


def _route(
    model: nn.Module, routed: list[bool], settings: RoutingSettings, device: torch.device | None
) -> None:
    config: Any = model.config
    for index, block in enumerate(_decoder_layers(model)):
        if routed[index]:
            routing = Routing(config.hidden_size, settings, index).to(device)
            route_layer(block, routing, config, index)
    model.register_forward_pre_hook(_commit_before)


def _commit_before(model: nn.Module, args: Any) -> None:
    if model.training and torch.is_grad_enabled():
        commit_routing(model)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    config: Any = model.config
    depth = getattr(config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {depth} layers: wrap a layer with "
            "aiether.adaptive.MixtureOfDepths instead"
        )
    return lists[0]


def _check(model: PreTrainedModel, routed: list[bool]) -> None:
    """Raise ValueError for an architecture whose layers cannot do with some of the tokens."""
    config: Any = model.config
    if len(routed) != len(_decoder_layers(model)):
        raise ValueError(
            f"routed_layers has {len(routed)} entries for {len(_decoder_layers(model))} layers: "
            "one for each is meant"
        )
    reasons = {
        "its layers are routed by its own configuration (routed_layers)": isinstance(config, LahrConfig),
        "it has an encoder": config.is_encoder_decoder or getattr(config, "add_cross_attention", False),
        "its attention is not called through transformers' attention interface, so that masks and positions "
        "of its own (ALiBi, windows) could not be kept": not model._supports_attention_backend,
        "layers share their keys and values": bool(getattr(config, "num_kv_shared_layers", 0)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"Mixture-of-Depths does not work on {type(model).__name__}: {reason}; "
                "take another architecture"
            )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation is {config._attn_implementation!r}: Mixture-of-Depths works with 'sdpa' "
            "and 'eager'; load the model with one of them"
        )
