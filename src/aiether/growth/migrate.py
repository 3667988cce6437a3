"""Carry a growth out: a pure function from one training state to another.

Nothing here knows whether the state came from a live model, a checkpoint or a sharded one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..geometry import History
from ..geometry.gram import one_thread
from .config import GrowthConfig, Initialiser
from .families import Family, block_tensors, family_of
from .initialise import INITIALISERS, BlockSource, Metrics
from .moments import ParameterMoments, new_moments
from .plan import GrowthPlan
from .structure import written_out

_PIECE = {"cpu": 1 << 18}
"""Elements that are measured at a time: on a CPU few enough to stay in its cache, not in new memory."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that training a model has accumulated, by name.

    Attributes
    ----------
    config: the model's configuration dict (transformers' `config.to_dict()`); empty for a module without any.
    tensors: `model.state_dict()`; tied tensors may stand under both names. A mapping may load them when they
        are asked for.
    moments: optimizer state by parameter name, such as `{"exp_avg": ..., "exp_avg_sq": ..., "step": ...}`.
    step: optimizer steps done.
    extra: JSON that is passed through untouched.
    family: where the blocks are; None: found by the configuration (`training_family`).
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    moments: dict[str, ParameterMoments] = field(default_factory=dict)
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    family: Family | None = None


def training_family(state: TrainingState) -> Family:
    """The family that a training state names, else the one that its configuration and tensor names tell.

    Raises
    ------
    ValueError
        If there is none; the message says how to name the list of blocks.
    """
    return state.family or family_of(state.config, names=state.tensors)


@dataclass(frozen=True)
class Migration:
    """The grown state, what was measured for each new tensor, and the plan that was carried out."""

    state: TrainingState
    tensor_metrics: dict[str, Metrics]
    plan: GrowthPlan


def migrate(
    state: TrainingState,
    plan: GrowthPlan,
    *,
    growth: GrowthConfig,
    trajectory: History | None = None,
    final_depth: int,
    seed: int,
) -> Migration:
    """Grow a training state by `plan`; the input is not modified.

    Old tensors and moments are the same objects under their new names (no copy, so ties between names hold);
    new tensors are fresh storage with their source's dtype and device, but what layers share, a new layer
    shares too. What is drawn depends only on `seed`, `state.step` and the new layer's index. `plan.init`
    chooses the initialiser, `growth` its settings.

    Raises
    ------
    ValueError
        If plan, configuration and tensors disagree on the depth, no blocks are found, or `zero` cannot hold.
    """
    family = training_family(state)
    blocks = block_tensors(state.tensors, family)
    _check_depth(state, plan, blocks, family)
    shared = shared_names(state.tensors, family)
    made: dict[int, dict[str, Tensor]] = {}
    tensor_metrics: dict[str, Metrics] = {}
    for layer in plan.new_layers:
        made[layer], metrics = make_layer(
            state, plan, layer, family=family, growth=growth, trajectory=trajectory, final_depth=final_depth,
            seed=seed, shared=shared,
        )  # fmt: skip
        tensor_metrics |= {family.name(layer, suffix): entry for suffix, entry in metrics.items()}
    grown = replace(
        state,
        config=grow_config(state.config, plan, family),
        tensors=_renumber(state.tensors, plan, family, made),
        moments=_grow_moments(state.moments, plan, family, growth, shared),
        extra=dict(state.extra),
    )
    return Migration(grown, tensor_metrics, plan)


def make_layer(
    state: TrainingState,
    plan: GrowthPlan,
    layer: int,
    *,
    family: Family,
    growth: GrowthConfig,
    trajectory: History | None = None,
    final_depth: int,
    seed: int,
    shared: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tensor], dict[str, Metrics]]:
    """The tensors of one new layer by suffix, and what was measured for each: `migrate`, layer by layer.

    Only the tensors of the layer's source are read from `state.tensors`, so that a model larger than memory
    can be grown one block at a time. `shared` are the names that layers share (`shared_names`); files hold
    each tensor once.
    """
    origin = plan.layers[layer]
    names = block_tensors(state.tensors, family)[origin.source]
    source = BlockSource(
        layer=origin.source,
        tensors={suffix: state.tensors[name] for suffix, name in names.items()},
        trajectory=trajectory,
        family=family,
        config=state.config,
        final_depth=final_depth,
        generator=layer_generator(seed, state.step, layer),
        growth=replace(growth, **origin.gains),
        shared=frozenset(suffix for suffix, name in names.items() if name in shared),
    )
    return _make_block(source, plan.init)


def check_depth(state: TrainingState, plan: GrowthPlan, family: Family) -> None:
    """Raise ValueError if plan, configuration and tensors do not agree on the number of layers."""
    _check_depth(state, plan, block_tensors(state.tensors, family), family)


def _check_depth(state: TrainingState, plan: GrowthPlan, blocks: Mapping[int, Any], family: Family) -> None:
    stated = family.depth(state.config) if state.config else len(blocks)
    if list(blocks) != list(range(stated)) or not blocks:
        raise ValueError(
            f"the configuration states {stated} layers, the tensors hold layers {list(blocks)} under "
            f"{family.blocks!r}: give the configuration and the state dict of the same model"
        )
    if plan.depth_before != stated:
        raise ValueError(
            f"the plan is for {plan.depth_before} layers, the model has {stated}: plan from this model"
        )


def shared_names(tensors: Mapping[str, Tensor], family: Family) -> frozenset[str]:
    """Names in blocks of tensors that stand in another block, or outside the blocks, as well."""
    places: dict[Any, set[int | None]] = {}
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        parts = family.split(name)
        places.setdefault(key, set()).add(parts[0] if parts else None)
        names.setdefault(key, []).append(name)
    shared = (name for key, where in places.items() if len(where) > 1 for name in names[key])
    return frozenset(name for name in shared if family.split(name))


def _identity(tensor: Tensor) -> Any:
    """The same for two state dict entries of one parameter; without memory the object itself tells."""
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _make_block(source: BlockSource, init: Initialiser) -> tuple[dict[str, Tensor], dict[str, Metrics]]:
    with torch.no_grad():
        tensors, own = INITIALISERS[init](source)
    _restore_ties(source, tensors)
    metrics: dict[str, Metrics] = {}
    for suffix, tensor in tensors.items():
        change = _change(source.tensors[suffix], tensor)
        metrics[suffix] = {"init": init, "source": source.layer, **change, **own.get(suffix, {})}
    return tensors, metrics


def _restore_ties(source: BlockSource, tensors: dict[str, Tensor]) -> None:
    """One tensor under several names of a block stays one; what layers share is not made anew."""
    first: dict[Any, str] = {}
    for suffix, tensor in source.tensors.items():
        if suffix in source.shared:
            tensors[suffix] = tensor
        else:
            tensors[suffix] = tensors[first.setdefault(_identity(tensor), suffix)]


def _change(source: Tensor, new: Tensor) -> Metrics:
    if not new.is_floating_point():
        return {}
    norms: list[Tensor] = []
    changes: list[Tensor] = []
    piece = _PIECE.get(source.device.type, 1 << 24)
    with one_thread(source.device):
        for old, made in zip(source.reshape(-1).split(piece), new.reshape(-1).split(piece), strict=True):
            wide = old.float()
            norms.append(torch.linalg.vector_norm(wide))
            if not torch.equal(old, made):  # a copy is known sooner than it is measured
                changes.append(torch.linalg.vector_norm(made.float() - wide))
    norm, change = (
        float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0 for parts in (norms, changes)
    )
    return {"source_norm": norm, "relative_change": change / norm if norm else None}


def layer_generator(seed: int, step: int, layer: int) -> torch.Generator:
    """The CPU generator of one new layer: the same on every machine for the same three numbers."""
    digest = hashlib.sha256(f"new layer:{seed}:{step}:{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def renames(names: Iterable[str], plan: GrowthPlan, family: Family) -> dict[str, tuple[str, ...]]:
    """Old name -> the names it has in the grown model: its own first, then those made from it."""
    positions = {source: [plan.old_to_new[source]] for source in range(plan.depth_before)}
    for layer in plan.new_layers:
        positions[plan.layers[layer].source].append(layer)
    result: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = family.split(name)
        result[name] = (
            tuple(family.name(layer, parts[1]) for layer in positions[parts[0]]) if parts else (name,)
        )
    return result


def origins(names: Iterable[str], plan: GrowthPlan, family: Family) -> dict[str, tuple[str, int | None]]:
    """Name in the grown model -> the old name it comes from, and the new layer it belongs to, if to one.

    In the order of a state dict: the new layers stand among the old ones.
    """
    names = list(names)
    blocks = block_tensors(names, family)
    result: dict[str, tuple[str, int | None]] = {}
    for name in names:
        if family.split(name) is None:
            result[name] = (name, None)
        elif name == next(iter(blocks[0].values())):
            for layer, origin in enumerate(plan.layers):
                for suffix, old in blocks[origin.source].items():
                    result[family.name(layer, suffix)] = (old, layer if origin.is_new else None)
    return result


def _renumber(
    tensors: Mapping[str, Tensor], plan: GrowthPlan, family: Family, made: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Old tensors under their new names, new ones among them, in the order of a state dict."""
    new = {family.name(layer, suffix): t for layer, block in made.items() for suffix, t in block.items()}
    return {
        name: tensors[old] if layer is None else new[name]
        for name, (old, layer) in origins(tensors, plan, family).items()
    }


def _grow_moments(
    moments: Mapping[str, ParameterMoments],
    plan: GrowthPlan,
    family: Family,
    growth: GrowthConfig,
    shared: frozenset[str],
) -> dict[str, ParameterMoments]:
    if growth.moments == "reset":
        return {}
    result: dict[str, ParameterMoments] = {}
    for name, (own, *new) in renames(moments, plan, family).items():
        if name in shared:  # the grown model lists it once, where it meets it first
            result[min((own, *new), key=lambda place: family.split(place) or (0, ""))] = dict(moments[name])
            continue
        result[own] = dict(moments[name])
        for fresh in new:
            if entries := new_moments(moments[name], growth.moments):
                result[fresh] = entries
    return result


def grow_config(config: Mapping[str, Any], plan: GrowthPlan, family: Family) -> dict[str, Any]:
    """The configuration of the grown model: its depth, and everything that it says layer by layer.

    Lists that the configuration leaves to a rule (Qwen2's `max_window_layers`, Gemma 3's
    `sliding_window_pattern`) are written out first: applied to the grown model, the rule would give old
    layers another type. A written list wins over the rule when the configuration is read.

    Raises
    ------
    ValueError
        If a list does not have one entry a layer, attention is scaled by the layer's index and old layers
        move, layers have settings of their own, or the family names no depth in a configuration.
    """
    if not config:
        return {}
    moved = any(old != new for old, new in plan.old_to_new.items())
    if config.get("scale_attn_by_inverse_layer_idx") and moved:
        raise ValueError(
            "scale_attn_by_inverse_layer_idx ties a layer's function to its index, and this plan moves old "
            "layers: use placement 'stack' or 'top'"
        )
    if config.get("per_layer_config"):
        raise ValueError(
            "the configuration gives layers settings of their own (per_layer_config), which growth does not "
            "move: grow a model whose layers are alike"
        )
    if family.depth_key is None:
        raise ValueError(
            f"which setting of this {family.model_type} configuration is the number of layers? Name it: "
            "family_of(model, blocks=..., depth_key=...)"
        )
    grown = dict(config)
    for key in {family.depth_key, "num_hidden_layers"} & set(config):
        grown[key] = plan.depth_after
    for key, values in _per_layer(config, family).items():
        if len(values) != plan.depth_before:
            raise ValueError(
                f"configuration list {key!r} has {len(values)} entries for {plan.depth_before} layers"
            )
        grown[key] = [values[origin.source] for origin in plan.layers]
    return grown


def check_routed_groups(config: Mapping[str, Any], plan: GrowthPlan) -> None:
    """Raises ValueError where the last of each few layers is routed, and no longer would be after growth."""
    before = [bool(routed) for routed in config.get("routed_layers") or ()]
    if True not in before:
        return
    every = before.index(True) + 1
    after = [before[origin.source] for origin in plan.layers]
    if before != [layer % every == every - 1 for layer in range(len(before))]:
        return
    if len(after) % every or after != [layer % every == every - 1 for layer in range(len(after))]:
        raise ValueError(
            f"the last of each {every} layers is routed, and growing from {plan.depth_before} to "
            f"{plan.depth_after} layers by placement {plan.placement!r} would break that: grow by whole "
            f"groups of {every}, with placement 'stack'"
        )


def _per_layer(config: Mapping[str, Any], family: Family) -> dict[str, list[Any]]:
    """The lists with one entry a layer, those that a rule stands for written out."""
    if any(config.get(key) is None for key in family.per_layer_keys) and "model_type" in config:
        written = written_out(config)
    else:
        written = config
    lists = {key: config.get(key) or written.get(key) for key in family.per_layer_keys}
    return {key: values for key, values in lists.items() if values is not None}
