"""The model at a stage's start: built from a migrated state, frozen and compiled as the stage wants it."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from aiether.adaptive import LatentReasoning, ProductKeyMemory
from aiether.growth import (
    Family,
    GrowthController,
    GrowthPlan,
    Migration,
    TrainingState,
    check_blocks_match,
    grow_config,
    renames,
)

from ._checkpoint import Moments
from ._described import fresh_model


def build_model(previous: PreTrainedModel, state: TrainingState) -> PreTrainedModel:
    """A fresh model of the previous one's class that holds exactly `state` (names and shapes are checked)."""
    config = with_settings(previous.config, state.config)
    with torch.random.fork_rng(), torch.device(previous.device):
        model = type(previous)(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state.tensors:  # others (rotary frequencies) keep the precision they are made in
            tensor.data = tensor.data.to(state.tensors[name].dtype)
    model.load_state_dict(state.tensors, strict=True)
    for name in ("generation_config", "loss_type"):  # an encoder has neither
        if hasattr(previous, name):
            setattr(model, name, getattr(previous, name))
    return model.train(previous.training)


def with_settings(config: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a configuration in which what differs from `settings` is set to them."""
    changed, before = copy.deepcopy(config), config.to_dict()
    for key, value in settings.items():
        if before.get(key) != value:
            setattr(changed, key, value)
    return changed


def check_plan_fits(model: PreTrainedModel, plan: GrowthPlan, family: Family) -> PreTrainedModel:
    """Build both configurations without data: would every layer stay what it is in the grown model?

    A `model` without data (meta device) counts as freshly built. Returns the grown one, without data.

    Raises
    ------
    ValueError
        Where the configuration ties a layer's form to its index, naming the first difference.
    """
    grown = grow_config(model.config.to_dict(), plan, family)
    before = model if model.device.type == "meta" else fresh_model(model)
    after = fresh_model(model, with_settings(model.config, grown))
    check_blocks_match(before, after, plan, family)
    return after


@dataclass(frozen=True)
class Growth:
    """A growth carried out on a live model."""

    model: PreTrainedModel
    migration: Migration
    renames: dict[str, tuple[str, ...]]  # old name -> its own new name, then those made from it


def grow_model(
    model: PreTrainedModel, moments: Moments, controller: GrowthController, plan: GrowthPlan, step: int
) -> Growth:
    """Migrate a live model's state and build the grown model around it; the old model stays as it is.

    If it raises, the controller is as it was too, but for snapshots that the migration had used already.
    """
    check_plan_fits(model, plan, controller.family)
    state = _state_of(model, moments, controller.family, step)
    before = copy.copy(controller)
    migration = controller.grow(state, plan)
    try:
        grown = build_model(model, migration.state)
    except Exception:
        controller.undo_growth(before)
        raise
    return Growth(grown, migration, renames(state.tensors, plan, controller.family))


def fork_model(
    model: PreTrainedModel, moments: Moments, controller: GrowthController, plan: GrowthPlan | None, step: int
) -> tuple[PreTrainedModel, Moments, dict[str, tuple[str, ...]]]:
    """A second model, grown by `plan` or (None) alike, its moments, and what each old name has become.

    Model and controller stay as they are.
    """
    state = _state_of(model, moments, controller.family, step)
    if plan is None:
        return build_model(model, state), moments, {}
    check_plan_fits(model, plan, controller.family)
    grown = controller.preview(state, plan).state
    return build_model(model, grown), grown.moments, renames(state.tensors, plan, controller.family)


def _state_of(model: PreTrainedModel, moments: Moments, family: Family, step: int) -> TrainingState:
    return TrainingState(
        config=model.config.to_dict(), tensors=model.state_dict(), moments=moments, step=step, family=family
    )


def blocks_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def compile_blocks(model: PreTrainedModel, family: Family, *, cuda_graphs: bool = False) -> None:
    """Compile block by block: depth growth then makes no new graph.

    A graph limit that is hit raises instead of falling back to eager with a warning. The cache must be off,
    since it makes every layer a graph of its own.

    With `cuda_graphs` every block's kernels are recorded once and replayed, so that a slow processor does not
    hold a GPU up. Every forward pass of the model then starts anew in the graphs' memory: what an earlier one
    left (hidden states, a loss not yet propagated back) must not be used any more. Each shape of batch is
    recorded.
    """
    if model.config.use_cache:
        raise ValueError(
            "compiled blocks need config.use_cache=False: with the cache every layer is a graph of its own"
        )
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    settings: dict[str, Any] = {}
    if cuda_graphs:
        hooks = model.base_model._forward_pre_hooks
        if _begin_step not in hooks.values():
            model.base_model.register_forward_pre_hook(_begin_step)
        # Nothing that leaves kernels out: a graph that is cut in pieces costs more than it saves (measured).
        settings = {"options": {"triton.cudagraphs": True}}
    for block in blocks_of(model, family):
        block.compile(**settings)
    for module in model.modules():
        if isinstance(module, LatentReasoning | ProductKeyMemory):
            module.compile(**settings)


def _begin_step(model: nn.Module, inputs: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()


def set_trainable(
    model: PreTrainedModel, family: Family, frozen: frozenset[str], layers: frozenset[int] | None
) -> None:
    """Let only the blocks in `layers` train (None: everything), except what the user froze by name."""
    for name, parameter in model.named_parameters():
        selected = layers is None or _layer_of(name, family) in layers
        parameter.requires_grad_(selected and name not in frozen)


def frozen_names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def names_of_layers(names: Iterable[str], family: Family, layers: Iterable[int]) -> list[str]:
    wanted = set(layers)
    return [name for name in names if _layer_of(name, family) in wanted]


def _layer_of(name: str, family: Family) -> int | None:
    parts = family.split(name)
    return parts[0] if parts else None


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch from (seed, step, rank).

    The random stream of a step then depends on its number alone: a resumed run draws what the
    uninterrupted one drew, whatever ran in between (an evaluation, a growth, another process).
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest) >> 1
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)  # noqa: NPY002 - the global stream is what datasets draw from
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # for each kind of device that is not there torch would note down where it was asked: 2 % of a step
        torch.default_generator.manual_seed(value)
