"""How a model family names its blocks: all that growth has to know about an architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of one family of pre-norm decoders.

    Attributes
    ----------
    model_type: transformers' `config.model_type`.
    blocks: path of the block list in parameter names, without a trailing dot.
    output_projections: modules inside a block that write into the residual stream. Zeroing their tensors
        makes a pre-norm block the identity; their initial scale falls with the final depth.
    depth_key: the configuration's attribute for the number of layers.
    per_layer_keys: configuration lists with one entry a layer, which must move with the layers.
    """

    model_type: str
    blocks: str
    output_projections: tuple[str, ...]
    depth_key: str = "num_hidden_layers"
    per_layer_keys: tuple[str, ...] = ("layer_types",)

    def split(self, name: str) -> tuple[int, str] | None:
        """`transformer.h.3.attn.c_attn.weight` -> `(3, "attn.c_attn.weight")`; None outside the blocks."""
        match = re.match(re.escape(self.blocks) + r"\.(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def name(self, layer: int, suffix: str) -> str:
        """The inverse of `split`."""
        return f"{self.blocks}.{layer}.{suffix}"

    def is_output_projection(self, suffix: str) -> bool:
        """Whether a tensor inside a block belongs to a projection into the residual stream."""
        return suffix.rpartition(".")[0] in self.output_projections

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of layers that a configuration dict states."""
        if self.depth_key not in config:
            raise ValueError(f"the configuration of a {self.model_type} model lacks {self.depth_key!r}")
        return int(config[self.depth_key])


_LLAMA_LAYOUT = {"blocks": "model.layers", "output_projections": ("self_attn.o_proj", "mlp.down_proj")}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gpt2",
            blocks="transformer.h",
            output_projections=("attn.c_proj", "mlp.c_proj"),
            depth_key="n_layer",
        ),
        Family(model_type="llama", **_LLAMA_LAYOUT),
        Family(model_type="mistral", **_LLAMA_LAYOUT),
        Family(model_type="qwen2", **_LLAMA_LAYOUT),
        Family(model_type="qwen3", **_LLAMA_LAYOUT),
    )
}
"""Registry by `model_type`; one entry makes a family growable."""


def family_of(source: Any) -> Family:
    """The family of a model, a configuration, a configuration dict or a `model_type`.

    Raises
    ------
    ValueError
        For a family that is not registered.
    """
    config = getattr(source, "config", source)
    if isinstance(config, Mapping):
        model_type = config.get("model_type")
    else:
        model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not known to growth (known: {', '.join(sorted(FAMILIES))}); "
            "register it with aiether.growth.FAMILIES[model_type] = aiether.growth.Family(...)"
        )
    return FAMILIES[model_type]


def block_tensors(names: Iterable[str], family: Family) -> dict[int, dict[str, str]]:
    """Group names by layer: `{layer: {suffix: name}}`, layers in order."""
    blocks: dict[int, dict[str, str]] = {}
    for name in names:
        if (parts := family.split(name)) is not None:
            blocks.setdefault(parts[0], {})[parts[1]] = name
    return dict(sorted(blocks.items()))
