"""Toroidal attention in a trained Hugging Face decoder: the model that it was, until progress moves it.

Layers keep their weights, biases, head order and rotary positions; the torus takes the place of the function
that compares queries with keys, which transformers calls by name. The mask function is registered under the
same name: without one transformers passes no mask, and a model would see the future.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.initialization import guard_torch_init_functions
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .architecture import attention_modules, check_conversion, has_window, head_dim_of
from .attention import Places, toroidal_attention
from .kernels import QUERIES
from .over_ranks import attend_over_shards, check_mask, current_shards
from .settings import Backend, ToroidalSettings, settings_of
from .storage import SUFFIX, forget_differences, save_differences
from .terms import TorusTerms

IMPLEMENTATION = "aiether_toroidal"
"""The name under which transformers finds the attention and its mask."""
_FOREIGN = ("position_bias", "s_aux", "softcap")
"""What transformers' attention functions may be given and a torus has no place for."""


def retrofit(
    model: PreTrainedModel,
    *,
    layers: Sequence[int],
    settings: ToroidalSettings | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Give layers of a trained decoder toroidal attention, in place; the model computes what it did.

    `set_progress(model, 1.0)` moves it to the targets, training along the way.

    Args:
        layers: which, from 0.
        settings: the targets; `options` are fields of `ToroidalSettings`.

    Raises
    ------
    ValueError
        If a layer is named that there is not, the platters do not fit its heads, or the architecture's
        attention cannot be taken over.

    Notes
    -----
    Plain attention, also of the other layers, is computed by SDPA, as transformers does by default: a model
    that did so too computes bit by bit what it did, another up to rounding. At progress 0 the terms have no
    part in what is computed, and so no gradients: to train them, set progress above 0 before.
    """
    settings, layers = settings_of(settings, options), _whole_numbers(layers)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"the model is a {type(model).__name__}: give a model of transformers, a peft model as its own "
            "merge_and_unload() returns it"
        )
    if isinstance(model, ToroidalDecoder):
        raise ValueError("the model has toroidal layers already: begin from the model as it was before")
    check_conversion(model, layers, settings)
    model_class, config_class = _toroidal_classes(type(model))
    made = [(attention, _terms(attention, settings)) for attention in attention_modules(model, layers)]
    for attention, terms in made:
        _attach(attention, terms)
    _give_own_config(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    model.config.__class__ = config_class
    model.config.toroidal = {"layers": sorted(layers), "progress": 0.0, **asdict(settings)}
    model.__class__ = model_class
    model.config.architectures = [model_class.__name__]
    model._attention_before = before  # type: ignore[assignment]
    model._made_of = model.config._name_or_path  # type: ignore[assignment]
    return model


def _give_own_config(model: PreTrainedModel) -> None:
    """Other models may be made of the same configuration, which is about to change."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own  # type: ignore[assignment]


def _whole_numbers(layers: Any) -> list[int]:
    """Raises ValueError for anything but several whole numbers; strings and truth values are none."""
    given = [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    if not given or any(isinstance(n, bool) or not isinstance(n, Integral) for n in given):
        raise ValueError(f"layers is {layers!r}: several whole numbers are meant, as [0, 16]")
    return [int(number) for number in given]


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `retrofit`, in place: the plain class without the terms; weights that training moved stay moved.

    The attention implementation is the one that it had; of a model that was loaded as a whole, SDPA.

    Raises
    ------
    ValueError
        If the model has no toroidal layers.
    """
    if not isinstance(model, ToroidalDecoder):
        raise ValueError("the model has no toroidal layer: there is nothing to restore")
    for attention in attention_modules(model, model.config.toroidal["layers"]):
        del attention.torus
    plain_class, before = _plain_class(type(model)), model._attention_before
    del model.config.toroidal, model._attention_before, model._made_of
    model.config.__class__ = plain_class.config_class
    model.config.architectures = [plain_class.__name__]
    model.__class__ = plain_class
    model.set_attn_implementation(before)
    return model


def set_progress(model: nn.Module, progress: float) -> None:
    """Move every toroidal layer of a model: 0 is plain attention, 1 the targets of its settings.

    Raises
    ------
    ValueError
        If there is no such layer, or the number is not from 0 to 1.
    """
    for terms in _any_terms(model):
        terms.set_progress(progress)
    for module in model.modules():
        if isinstance(module, ToroidalDecoder):
            module.config.toroidal = {**module.config.toroidal, "progress": progress}


def set_backend(model: nn.Module, backend: Backend) -> None:
    """Have every toroidal layer of a model compute by these kernels; a matter of the machine, and not stored.

    `auto` takes the fused ones that can; cuDNN's are never taken unless they are asked for. Where there is a
    mask of more than causality, as with padding, the eager path computes whatever is asked for.

    Raises
    ------
    ValueError
        If there is no such layer, or a layer's distance or window is none for these kernels.
    """
    found = _any_terms(model)
    chosen = [replace(terms.settings, backend=backend) for terms in found]
    for terms, settings in zip(found, chosen, strict=True):
        terms.settings = settings
    for module in model.modules():
        if isinstance(module, ToroidalDecoder):
            module.config.toroidal = {**module.config.toroidal, "backend": backend}


def _any_terms(model: nn.Module) -> list[TorusTerms]:
    """Raises ValueError if there are none."""
    found = list(torus_terms(model))
    if not found:
        raise ValueError("the model has no toroidal layer: call aiether.retrofit on it first")
    return found


def _progress_of(model: nn.Module) -> float:
    """How far the model has moved, by its own tensors: a checkpoint that was loaded says nothing else."""
    return max(float(terms.progress) for terms in torus_terms(model))


def torus_terms(model: nn.Module) -> Iterator[TorusTerms]:
    """The terms of each toroidal layer, in the model's order."""
    return (module for module in model.modules() if isinstance(module, TorusTerms))


class ToroidalDecoder:
    """What is mixed into a model's class."""

    config: Any
    _attention_before: str
    _made_of: str

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config._attn_implementation = IMPLEMENTATION
        kind, config.__class__ = type(config), _plain_class(type(self)).config_class
        try:  # within a model with another head transformers asks by the configuration's class for its body
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = kind
        held = dict(config.toroidal)
        layers, progress, _ = held.pop("layers"), held.pop("progress"), held.pop("base", None)
        settings = ToroidalSettings(**held)
        for attention in attention_modules(self, layers):  # type: ignore[arg-type]
            _attach(attention, _terms(attention, settings))
        if progress:
            set_progress(self, progress)  # type: ignore[arg-type]
        self._attention_before, self._made_of = "sdpa", ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For pickle and copy, which cannot find a class that was made on the fly by its name."""
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return _blank_model, (_plain_class(type(self)),), *state

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        whole: bool | None = None,
        base: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Store what differs from the base model, for `aiether.load`, or the whole model.

        Args:
            is_main_process: as transformers has it; differences are written by the main process alone.
            whole: everything, as transformers does. None: where the base is not known, as of a model that
                was loaded as a whole, where the caller brings a state of its own, as the Trainer's
                checkpoints do, and where the model is none for causal language modelling.
            base: folder or name of the base model; None: where the model was loaded from.
            kwargs: further ones of transformers, for the whole model.

        Raises
        ------
        ValueError
            For an argument that a folder of differences cannot have, such as `push_to_hub`, and for a base
            that is not this model's.
        """
        backend = self.config.toroidal.get("backend", "auto")
        stored = {"progress": _progress_of(self), "backend": "auto"}  # type: ignore[arg-type]
        self.config.toroidal = {**self.config.toroidal, **stored}
        known = base or self.config.toroidal.get("base") or self._made_of
        if not _is_causal_lm(_plain_class(type(self))):
            if whole is False or base:
                raise ValueError(
                    f"{type(self).__name__} is no model for causal language modelling, which alone are "
                    "stored as what differs: leave whole and base out to save the whole model"
                )
            whole = True
        try:
            if whole or (whole is None and (not known or "state_dict" in kwargs)):
                if is_main_process:
                    forget_differences(save_directory)
                super().save_pretrained(save_directory, is_main_process, **kwargs)  # type: ignore[misc]
            elif is_main_process:
                save_differences(self, save_directory, base, **kwargs)
        finally:
            self.config.toroidal = {**self.config.toroidal, "backend": backend}

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for another one, which would compute the plain model and say nothing of it."""
        asked = (
            attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        )
        if any(name != IMPLEMENTATION for name in asked):
            raise ValueError(
                f"the model has toroidal layers, which {attn_implementation!r} would leave out: call "
                "aiether.toroidal.restore first, or set_progress(model, 0.0) for the attention that was"
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the whole model, as transformers does: a base that lies in a folder is not on the Hub."""
        self.save_pretrained = partial(self.save_pretrained, whole=True)  # which transformers calls
        try:
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.save_pretrained

    def initialize_weights(self) -> None:
        """Of what a checkpoint lacks: transformers would ask the model's body, which knows no terms."""
        with torch.no_grad(), guard_torch_init_functions():  # what was loaded is left alone
            for terms in torus_terms(self):  # type: ignore[arg-type]
                terms.reset_parameters()
                nn.init.constant_(terms.progress, self.config.toroidal["progress"])
        super().initialize_weights()  # type: ignore[misc]


def _terms(attention: Any, settings: ToroidalSettings) -> TorusTerms:
    """The layer's terms; a layer with a window of its own no longer has the first tokens, nor sinks."""
    config = attention.config
    if has_window(config, attention.layer_idx):
        settings = replace(settings, sinks=0)
    return TorusTerms(config.num_attention_heads, head_dim_of(attention), settings)


def _attach(attention: Any, terms: TorusTerms) -> None:
    reference = next(attention.parameters())
    attention.torus = terms.to(reference.device).train(attention.training)


def _plain_class(model_class: type) -> Any:
    """The class that a toroidal one was made of."""
    order = model_class.__mro__
    return order[order.index(ToroidalDecoder) + 1]


def _blank_model(plain: type[PreTrainedModel]) -> PreTrainedModel:
    """A toroidal model of a class, without content: pickle fills it."""
    toroidal_class, _ = _toroidal_classes(plain)
    return toroidal_class.__new__(toroidal_class)


def _blank_config(plain: type[PreTrainedConfig]) -> PreTrainedConfig:
    config_class = _toroidal_config(plain)
    return config_class.__new__(config_class)


@cache
def _toroidal_config(plain: Any) -> type[PreTrainedConfig]:
    """The configuration's class, one for all model classes that share a configuration."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = plain.__reduce_ex__(self, max(2, protocol))
        return _blank_config, (plain,), *state

    added = {
        "model_type": plain.model_type + SUFFIX,
        "toroidal": None,
        "__annotations__": {"toroidal": dict[str, Any] | None},
        "__reduce_ex__": reduce,
    }
    return type(f"Toroidal{plain.__name__}", (plain,), added)


@cache
def _toroidal_classes(
    model_class: type[PreTrainedModel],
) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """The classes of a model's toroidal form and its configuration, known to transformers' Auto classes."""
    plain: Any = model_class.config_class
    model_type, config_class = plain.model_type + SUFFIX, _toroidal_config(plain)
    toroidal_class: Any = type(
        f"Toroidal{model_class.__name__}",
        (ToroidalDecoder, model_class),
        {
            "config_class": config_class,
            "_keep_in_fp32_modules_strict": [*(model_class._keep_in_fp32_modules_strict or ()), "torus"],
            "__module__": __name__,
        },
    )
    AutoConfig.register(model_type, config_class, exist_ok=True)
    if _is_causal_lm(model_class):
        AutoModelForCausalLM.register(config_class, toroidal_class, exist_ok=True)
    renamed = get_checkpoint_conversion_mapping(plain.model_type)
    if renamed is not None:
        register_checkpoint_conversion_mapping(model_type, renamed, overwrite=True)
    return toroidal_class, config_class


def toroidal_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The toroidal form of a model's class, as transformers' Auto classes know it from then on."""
    return _toroidal_classes(model_class)[0]


def _is_causal_lm(model_class: Any) -> bool:
    """Whether it is what transformers' AutoModelForCausalLM takes for its configuration."""
    plain = model_class.config_class
    return plain in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[plain] is model_class


def register_toroidal(model_type: object) -> bool:
    """Whether a model type is a decoder's with toroidal layers; transformers' Auto classes then know it."""
    plain = str(model_type).removesuffix(SUFFIX)
    if plain == model_type or plain not in CONFIG_MAPPING:
        return False
    config_class = CONFIG_MAPPING[plain]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    _toroidal_classes(MODEL_FOR_CAUSAL_LM_MAPPING[config_class])
    return True


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: plain attention in other layers and at progress 0."""
    terms: TorusTerms | None = getattr(module, "torus", None)
    shards = current_shards()
    if shards is not None:
        given = (module, query, key, value, attention_mask, dropout, scaling, shards)
        return attend_over_shards(*given), None
    if terms is None or not terms.active:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise ValueError(
            f"{type(module).__name__} gives its attention {foreign[0]}, which toroidal attention does not "
            "know: it does not work on this architecture"
        )
    if not query.shape[-1] == value.shape[-1] == terms.head_dim:
        raise ValueError(
            f"{type(module).__name__} has queries of {query.shape[-1]} and values of {value.shape[-1]} "
            f"dimensions in heads of {terms.head_dim}: toroidal attention does not work on this architecture"
        )
    if is_causal is False:
        raise ValueError("is_causal=False: toroidal layers of a decoder see no later token; leave it out")
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # A static cache that was empty: by transformers' rule the queries are its first tokens.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    platters = toroidal_attention(
        query,
        key,
        value,
        terms(query),
        terms.settings,
        _places(query.shape[2], key.shape[2], attention_mask, key.device),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    return terms.fuse(platters).flatten(3).transpose(1, 2).contiguous(), None


def _places(num_queries: int, num_keys: int, mask: Tensor | None, device: torch.device) -> Places:
    """Where queries and keys stand. Without a mask they are the same tokens, or the query is the last key.

    With one, a token stands at the last key that it may see, its own. Keys that nobody sees, as padding on
    the left or between turns, have no place. Sinks are the first keys that a token sees, if a document
    begins there. A mask of numbers is added to the scores, as transformers has it.
    """
    numbers = torch.arange(num_keys, device=device)
    if mask is None:
        return Places(
            numbers[num_keys - num_queries :],
            numbers,
            causal=num_queries == num_keys,
            known_by=(num_queries, num_keys),
        )
    allowed, bias = mask, None
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        bias = mask.masked_fill(~allowed, 0)
    rows_BNM = allowed[:, 0]
    places_BM = rows_BNM.any(1).long().cumsum(-1) - 1
    blocks = rows_BNM.split(QUERIES, 1)
    own_BN = torch.cat([(rows * numbers).amax(-1) for rows in blocks], 1)
    seen_BN = torch.cat([rows.long().argmax(-1) for rows in blocks], 1)
    begun_BN = _begins(seen_BN, own_BN, num_keys)
    first_BN = torch.where(begun_BN, places_BM.gather(1, seen_BN), 0)
    query_BN = places_BM.gather(1, own_BN)
    return Places(query_BN, places_BM, allowed, causal=False, first=first_BN, bias=bias)


def _begins(seen_BN: Tensor, own_BN: Tensor, num_keys: int) -> Tensor:
    """Whether the first key that a query sees begins a document: the token that is there sees none before.

    Else it is where the mask's own window begins. Of a token that is in the cache alone nothing is known: it
    is taken for a beginning.
    """
    seen_by_BM = seen_BN.new_full((len(seen_BN), num_keys), -1).scatter(1, own_BN, seen_BN)
    there_BN = seen_by_BM.gather(1, seen_BN)
    return (there_BN == seen_BN) | (there_BN < 0)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A sharded sequence needs none: what a shard may see follows from its place in the whole."""
    if current_shards() is None:
        return sdpa_mask(*args, **kwargs)
    check_mask(**kwargs)
    return None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
