"""Weights for a new block, made from the block it is planned from.

Noise is drawn on the CPU in float32 and then moved, so that a new layer does not depend on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import History
from .config import MIN_SNAPSHOTS, GrowthConfig, Initialiser
from .families import Family

Metrics = dict[str, Any]
Initialised = tuple[dict[str, Tensor], dict[str, Metrics]]


@dataclass(frozen=True, kw_only=True)
class BlockSource:
    """All that an initialiser may look at.

    Attributes
    ----------
    layer: index of the source layer in the old model.
    tensors: its tensors by suffix (`attn.c_attn.weight`).
    trajectory: snapshots under full names, or None.
    family, config: names and the model's configuration dict.
    final_depth: planned depth, for the scale of random output projections.
    generator: CPU generator, seeded for this one new layer.
    growth: the initialisers' settings.
    shared: suffixes of tensors that are not this layer's alone, and stay what they are.
    """

    layer: int
    tensors: Mapping[str, Tensor]
    trajectory: History | None
    family: Family
    config: Mapping[str, Any]
    final_depth: int
    generator: torch.Generator
    growth: GrowthConfig
    shared: frozenset[str] = frozenset()


def output_projection_std(config: Mapping[str, Any], final_depth: int) -> float:
    """GPT-2's rule (section 2.3): the initial scale falls with the number of residual branches."""
    return initial_std(config) / math.sqrt(2 * final_depth)


def initial_std(config: Mapping[str, Any]) -> float:
    """Standard deviation of a fresh matrix: 0.02 where the configuration names none."""
    return float(config.get("initializer_range", config.get("init_std", 0.02)))


def initialise_output_projections(
    model: nn.Module,
    family: Family,
    final_depth: int,
    generator_of: Callable[[str], torch.Generator] | None = None,
) -> None:
    """Draw every output projection of a fresh model anew, at the scale for its planned final depth, in place.

    transformers scales GPT-2's by the depth at construction and Llama's not at all: one rule for every arm
    makes a model that grows to a depth comparable with one built at it. `generator_of` gives the generator
    for a tensor's name; without it torch's own is used.

    Raises
    ------
    ValueError
        If the model has none of the family's output projections.
    """
    std = output_projection_std(getattr(model, "config").to_dict(), final_depth)  # noqa: B009 - nn.Module has no `config`
    drawn = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = family.split(name)
            if parts is None or parameter.ndim < 2 or not family.is_output_projection(parts[1]):
                continue
            parameter.copy_(_normal(parameter, generator_of and generator_of(name)) * std)
            drawn += 1
    if not drawn:
        raise ValueError(
            f"the model has no output projection of family {family.model_type!r}: {family.output_projections}"
        )


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal float32 with the shape and device of `like`, the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)


def _copy(source: BlockSource) -> Initialised:
    return {suffix: tensor.detach().clone() for suffix, tensor in source.tensors.items()}, {}


def _zero(source: BlockSource) -> Initialised:
    """Copy, silenced: the residual branches add nothing and the function is kept.

    Pre-norm blocks lose their output projections, post-norm blocks the scale of the norm behind each branch.
    """
    values = silenced(source.family, source.tensors, source.shared)
    tensors, _ = _copy(source)
    for suffix, value in values.items():
        tensors[suffix].fill_(value)
    return tensors, {}


def silenced(family: Family, suffixes: Iterable[str], shared: frozenset[str]) -> dict[str, float]:
    """What `zero` fills tensors of a block with; `suffixes`: all of the block's, `shared`: with other layers.

    Raises
    ------
    ValueError
        If no filling keeps the model's function.
    """
    if family.refusal:
        raise ValueError(
            f"init 'zero' cannot keep the function of this {family.model_type}: {family.refusal}. Choose "
            "copy, noise, random or geometric, or name what silences a block: "
            "family_of(model, output_projections=(...))"
        )
    values = {suffix: value for suffix in suffixes if (value := family.identity_value(suffix)) is not None}
    if not values:
        raise ValueError(
            f"family {family.model_type!r} names no output projection of this block: 'zero' cannot keep the "
            "function; name them: family_of(model, output_projections=(...))"
        )
    for suffix in values:
        if suffix in shared:
            raise ValueError(
                f"init 'zero' would have to fill {suffix!r}, which layers share: choose another init"
            )
    return values


def _random(source: BlockSource) -> Initialised:
    """The model's own initialisation: normal matrices, neutral norms, zero biases, other vectors copied."""
    tensors, _ = _copy(source)
    std = initial_std(source.config)
    output_std = output_projection_std(source.config, source.final_depth)
    for suffix in sorted(tensors):
        tensor = tensors[suffix]
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            scale = output_std if source.family.is_output_projection(suffix) else std
            tensor.copy_(_normal(tensor, source.generator) * scale)
        elif suffix in source.family.unit_offset or "bias" in suffix.rpartition(".")[2]:
            tensor.fill_(0.0)
        elif suffix.endswith("weight"):
            tensor.fill_(1.0)
    return tensors, {}


def _noise(source: BlockSource) -> Initialised:
    """Copy plus Gaussian noise of `noise` times each matrix's Frobenius norm; vectors are copied."""
    tensors, _ = _copy(source)
    for suffix in sorted(tensors):
        tensor = tensors[suffix]
        if tensor.is_floating_point() and tensor.ndim > 1:
            noise = _normal(tensor, source.generator)
            length = source.growth.noise * torch.linalg.vector_norm(tensor.float())
            tensor.copy_(tensor.float() + noise * (length / torch.linalg.vector_norm(noise)))
    return tensors, {}


def _geometric(source: BlockSource) -> Initialised:
    """Each tensor continues its own trajectory (Definition 18); without a history it is copied."""
    tensors: dict[str, Tensor] = {}
    metrics: dict[str, Metrics] = {}
    for suffix, tensor in source.tensors.items():
        tensors[suffix], metrics[suffix] = _extrapolated(source, suffix, tensor)
    return tensors, metrics


def _extrapolated(source: BlockSource, suffix: str, tensor: Tensor) -> tuple[Tensor, Metrics]:
    trajectory, name = source.trajectory, source.family.name(source.layer, suffix)
    have = len(trajectory) if trajectory is not None and name in trajectory.names else 0
    if trajectory is None or have < MIN_SNAPSHOTS or not tensor.is_floating_point():
        return tensor.detach().clone(), {"fallback": f"copy: {have} snapshots, {MIN_SNAPSHOTS} are needed"}
    snapshots = trajectory.snapshots(name)
    new, metrics = source.growth.extrapolator().extrapolate(snapshots, trajectory.gram(name))
    last = snapshots[-1].to(tensor.device)
    new = new.to(tensor.device)
    if not torch.equal(last, tensor):
        # The weights have moved on since the last snapshot: take the step from where they are (continuity).
        wide = torch.promote_types(tensor.dtype, torch.float32)
        new = tensor.to(wide) + (new.to(wide) - last.to(wide))
    return new.to(tensor.dtype), metrics


INITIALISERS: dict[Initialiser, Callable[[BlockSource], Initialised]] = {
    "geometric": _geometric,
    "copy": _copy,
    "zero": _zero,
    "random": _random,
    "noise": _noise,
}
"""Registry: source block -> (tensors by suffix, metrics by suffix)."""
