"""How a model names its blocks: all that growth has to know about an architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

from .structure import (
    as_config,
    blocks_at,
    blocks_in_names,
    depth_key_of,
    examine,
    find_blocks,
    model_of,
    per_layer_keys,
    settings_of,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a model's blocks are and what silences them. `family_of` finds it; anyone may also write it.

    Attributes
    ----------
    blocks: path of the list of blocks in parameter names, without a trailing dot.
    output_projections: modules or tensors inside a block that write into the residual stream; `*` stands for
        one component of a name. Their initial scale falls with the final depth.
    identity: tensors inside a block and the value that each is filled with to make the block the identity.
        Empty: zero in every tensor of the output projections, which is right for pre-norm blocks.
    refusal: why no values make the block the identity (a norm on the residual stream); None when some do.
    unit_offset: tensors inside a block that are used as 1 + w (Gemma's norms).
    depth_key: the configuration's attribute for the number of layers; None for a module without any.
    per_layer_keys: configuration lists with one entry a layer, which must move with the layers.
    model_type: transformers' `config.model_type`, for messages and the registry.
    """

    blocks: str
    output_projections: tuple[str, ...] = ()
    identity: tuple[tuple[str, float], ...] = ()
    refusal: str | None = None
    unit_offset: tuple[str, ...] = ()
    depth_key: str | None = "num_hidden_layers"
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    model_type: str = "module"

    def split(self, name: str) -> tuple[int, str] | None:
        """`transformer.h.3.attn.c_attn.weight` -> `(3, "attn.c_attn.weight")`; None outside the blocks."""
        match = re.match(re.escape(self.blocks) + r"\.(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def name(self, layer: int, suffix: str) -> str:
        """The inverse of `split`."""
        return f"{self.blocks}.{layer}.{suffix}"

    def is_output_projection(self, suffix: str) -> bool:
        """Whether a tensor inside a block belongs to a projection into the residual stream."""
        return any(_matches(suffix, name) for name in self.output_projections)

    def identity_value(self, suffix: str) -> float | None:
        """The value that fills a tensor of a block that shall be the identity; None: it stays as it is."""
        if not self.identity:
            return 0.0 if self.is_output_projection(suffix) else None
        return next((value for name, value in self.identity if _matches(suffix, name)), None)

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of layers that a configuration dict states."""
        if self.depth_key is None or self.depth_key not in config:
            raise ValueError(
                f"the configuration of a {self.model_type} model lacks {self.depth_key!r}: name the setting "
                "that is the number of layers, family_of(model, depth_key=...)"
            )
        return int(config[self.depth_key])


def _matches(suffix: str, name: str) -> bool:
    """Whether `name` (of a tensor, or of the module that holds it) stands for the tensor `suffix`.

    A folder on disk may hold `experts.3.down_proj.weight` where the model holds one `experts.down_proj`.
    """
    for candidate in (suffix, re.sub(r"\.\d+(?=\.)", "", suffix)):
        if name in (candidate, candidate.rpartition(".")[0]):
            return True
    if "*" not in name:
        return False
    pattern = re.escape(name).replace(r"\*", "[^.]+")
    return re.fullmatch(rf"{pattern}(\.[^.]+)?", suffix) is not None


_LLAMA_PROJECTIONS = ("mlp.down_proj", "self_attn.o_proj")

FAMILIES: dict[str, Family] = {
    # A routed block adds what it changed: none, where its projections are zero. A trial run misses that.
    "lahr": Family(
        blocks="model.layers",
        output_projections=_LLAMA_PROJECTIONS,
        per_layer_keys=("routed_layers", "memory_reads"),
        model_type="lahr",
    ),
}
"""Registry by `model_type`, asked first: for a family of one's own that its structure does not tell."""

PROJECTIONS_ON_DISK: dict[str, tuple[str, ...]] = {
    # The folder holds one matrix for each expert, the model one tensor for all of them.
    "mixtral": ("block_sparse_moe.experts.*.w2",),
}
"""Output projections by `model_type` whose names in a checkpoint's folder are not the model's."""


def family_of(
    source: Any,
    *,
    blocks: str | None = None,
    output_projections: tuple[str, ...] | None = None,
    depth_key: str | None = None,
    names: Iterable[str] | None = None,
) -> Family:
    """The family of a model, a configuration, a configuration dict or a `model_type`, found by its structure.

    Parameters
    ----------
    source: a model (of transformers, or any module), or what describes one of transformers. A description is
        built on the meta device; nothing large is allocated and nothing is downloaded.
    blocks: path of the list of blocks, for a model in which it is not the only one.
    output_projections: modules or tensors in a block that write into the residual stream, where the trial run
        cannot find them.
    depth_key: the configuration's name for the number of layers, where it is not the usual one.
    names: tensor names of a checkpoint, which may lie under another prefix than the model's (`layers` of a
        bare model for `model.layers`).

    Raises
    ------
    ValueError
        If the list of blocks cannot be found; the message says how to name it. For a decoder of
        transformers' whose layers were routed: they are of two kinds, which follow their index.
    """
    if isinstance(source, Family):
        return source
    _check_not_routed(source)
    found = _find(source, blocks, depth_key)
    if output_projections is not None:
        found = replace(found, output_projections=tuple(output_projections), identity=(), refusal=None)
    return found if names is None else _under_prefix(found, list(names))


def _under_prefix(family: Family, names: list[str]) -> Family:
    if any(family.split(name) for name in names):
        return family
    return replace(family, blocks=blocks_in_names(names) or family.blocks)


def _find(source: Any, blocks: str | None, depth_key: str | None) -> Family:
    if not isinstance(source, nn.Module):
        if blocks is None and (registered := _registered(source)):
            return registered
        return _from_description(_fingerprint(source), blocks, depth_key)
    config = getattr(source, "config", None)
    registered = _registered(config)
    if registered and blocks is None and registered.blocks in dict(source.named_modules()):
        return registered
    if not hasattr(config, "to_json_string"):
        return _in_model(source, blocks, depth_key)
    # The modules count too: adapters and exchanged layers do not stand in the configuration.
    modules = tuple((path, type(m), *m._parameters) for path, m in source.named_modules())
    key = (type(source), hash(modules), _fingerprint(config), blocks, depth_key)
    if key not in _KNOWN:
        _KNOWN[key] = _in_model(source, blocks, depth_key)
        if len(_KNOWN) > _MAX_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
    return _KNOWN[key]


_MAX_KNOWN = 256
_KNOWN: dict[Any, Family] = {}
"""Families by class and configuration: a run asks again at every evaluation. (Models are not kept alive.)"""

_NO_STRUCTURE = frozenset(("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"))


def _fingerprint(source: Any) -> str:
    settings = {"model_type": source} if isinstance(source, str) else settings_of(source)
    kept = {key: value for key, value in settings.items() if key not in _NO_STRUCTURE}
    return json.dumps(kept, sort_keys=True, default=str)


def _registered(source: Any) -> Family | None:
    return FAMILIES.get(_model_type(source))


def _model_type(source: Any) -> str:
    """Of a configuration, a configuration dict, or the type itself."""
    if isinstance(source, Mapping):
        source = source.get("model_type")
    return source if isinstance(source, str) else str(getattr(source, "model_type", None))


def _check_not_routed(source: Any) -> None:
    model_type = _model_type(getattr(source, "config", None) if isinstance(source, nn.Module) else source)
    if model_type.endswith("_mixture_of_depths"):
        raise ValueError(
            f"a {model_type} does not grow: add_mixture_of_depths has routed some of its layers, so that "
            "they are of two kinds; grow the decoder as it was before and route the grown one, or train a "
            "model with --arch lahr, whose routed layers grow"
        )


@lru_cache(maxsize=_MAX_KNOWN)
def _from_description(fingerprint: str, blocks: str | None, depth_key: str | None) -> Family:
    return _in_model(model_of(as_config(json.loads(fingerprint))), blocks, depth_key)


def _in_model(model: nn.Module, blocks: str | None, depth_key: str | None) -> Family:
    config = getattr(model, "config", None)
    if blocks is None:
        depth_key = depth_key or depth_key_of(config)
        depth = settings_of(config).get(depth_key) if depth_key else None
        # An encoder and a decoder may both be as deep as the configuration's one number says.
        blocks = find_blocks(model, None if getattr(config, "is_encoder_decoder", False) else depth)
    depth_key = depth_key or depth_key_of(config, len(blocks_at(model, blocks)))
    found = examine(model, blocks)
    model_type = getattr(config, "model_type", "module")
    on_disk = PROJECTIONS_ON_DISK.get(model_type, ())
    aliases = dict.fromkeys(on_disk, 0.0) if found.values else {}
    return Family(
        blocks=blocks,
        output_projections=tuple(sorted({*map(_module_of, found.projections), *on_disk})),
        identity=tuple(sorted({**found.values, **aliases}.items())),
        refusal=found.obstacle,
        unit_offset=found.unit_offset,
        depth_key=depth_key,
        per_layer_keys=per_layer_keys(config, depth_key) if depth_key else (),
        model_type=model_type,
    )


def _module_of(name: str) -> str:
    """`mlp.down_proj.weight` -> `mlp.down_proj`; a tensor of another name stands for itself."""
    return name.removesuffix(".weight")


def block_tensors(names: Iterable[str], family: Family) -> dict[int, dict[str, str]]:
    """Group names by layer: `{layer: {suffix: name}}`, layers in order."""
    blocks: dict[int, dict[str, str]] = {}
    for name in names:
        if (parts := family.split(name)) is not None:
            blocks.setdefault(parts[0], {})[parts[1]] = name
    return dict(sorted(blocks.items()))
