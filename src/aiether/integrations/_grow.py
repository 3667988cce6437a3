"""Growth of a live model in place: model, optimizer and scheduler stay the objects that they are."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from aiether.geometry import Trajectory
from aiether.growth import (
    GROWTH_PRESETS,
    Family,
    GrowthConfig,
    GrowthPlan,
    LrPolicy,
    Migration,
    TrainingState,
    family_of,
    migrate,
    renames,
)
from aiether.growth import Moments as MomentsChoice
from aiether.growth.structure import settings_of

from ._blocks import block_list, compile_likewise, count_hooks, install_blocks, install_config, make_blocks
from ._depth import check_no_other_config, install_depth
from ._grow_optimizer import (
    GroupChange,
    GrownTensors,
    check_covers,
    grow_optimizer,
    is_ordered,
    moments_of,
    unwrap_optimizers,
)
from ._grow_report import FunctionChange, GrowthReport, LossFn, function_change, measure
from ._lr_policy import Rewarm, check_rewarm, restart_schedulers
from ._refuse import check_in_place, check_unwrapped
from ._structure import compare_with_fresh
from ._verify import GrowthError, check_blocks

CarryOut = Callable[[TrainingState], Migration]


def grow(
    model: nn.Module,
    plan: GrowthPlan,
    *,
    optimizer: Any,
    scheduler: Any = None,
    trajectory: Trajectory | None = None,
    batch: Any = None,
    loss_fn: LossFn | None = None,
    family: Family | None = None,
    growth: GrowthConfig | None = None,
    moments: MomentsChoice | None = None,
    lr_policy: LrPolicy | None = None,
    rewarm_steps: int | None = None,
    seed: int = 0,
    step: int = 0,
    final_depth: int | None = None,
    compile_block: Callable[[nn.Module], object] = nn.Module.compile,
) -> GrowthReport:
    """Grow a live model in place, between an optimizer step and the next backward pass.

    `model`, `optimizer` and `scheduler` stay the same objects, old tensors and their moments the same
    tensors; new tensors join the param groups of their sources. If anything fails, all are as before.

    Parameters
    ----------
    model
        The bare model on one device (unwrap it first): of transformers, or any module with a list of blocks.
    plan
        What to do, such as `GrowthPlan.stack(model, to_layers=24)`.
    optimizer
        The optimizer of all trainable tensors, several of them in a list, or None when none exists yet.
        Wrappers of Accelerate and Lightning are looked into.
    scheduler
        The learning-rate scheduler, or a list. It goes on as it is; only lr_policy "restart" touches it.
    trajectory
        Snapshots for init "geometric". It is emptied afterwards: it belongs to the smaller model.
    batch, loss_fn
        A batch on which the report measures the function gap and the loss, in evaluation mode: the model's
        keyword arguments as a mapping, its positional ones as a tuple, or its one argument.
        `loss_fn(output, batch)` where the output has no `loss`.
    family
        Where the blocks are; default: found by structure (`aiether.growth.family_of`).
    growth
        Settings of the initialisers, moments and learning rate; default: the preset `recommended`.
    moments, lr_policy, rewarm_steps
        Win over `growth` where given; see `GrowthConfig`.
    seed, step
        What is drawn depends on these two and a new layer's index alone. On several processes give the same.
    final_depth
        Planned depth, for the scale of init "random"; default: the plan's.
    compile_block
        How to compile the copy of a compiled block; give yours if it had settings.

    Raises
    ------
    ValueError
        If this model, optimizer or scheduler cannot be grown in place, the plan does not fit, or gradients
        are pending; the message says what to do.
    GrowthError
        If a trainable tensor is in no optimizer, or the grown model is not what its configuration describes.
    """
    if not isinstance(plan, GrowthPlan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"plan is {plan!r}: give a GrowthPlan, such as GrowthPlan.stack(model, to_layers=24)"
        )
    settings = _settings(growth, moments, lr_policy, rewarm_steps)

    def carry_out(state: TrainingState) -> Migration:
        if trajectory:
            _check_trajectory(trajectory, state.tensors)
        return migrate(
            state,
            plan,
            growth=settings,
            trajectory=trajectory,
            final_depth=final_depth or plan.depth_after,
            seed=seed,
        )

    report = grow_live(
        model,
        plan,
        carry_out,
        family=family,
        settings=settings,
        optimizers=unwrap_optimizers(optimizer),
        schedulers=_unwrap_schedulers(scheduler),
        step=step,
        batch=batch,
        loss_fn=loss_fn,
        compile_block=compile_block,
    )
    if trajectory is not None:
        trajectory.clear()
    return report


def _settings(
    growth: GrowthConfig | None,
    moments: MomentsChoice | None,
    lr_policy: LrPolicy | None,
    rewarm_steps: int | None,
) -> GrowthConfig:
    given = {"moments": moments, "lr_policy": lr_policy, "rewarm_steps": rewarm_steps}
    base = growth or GrowthConfig(**GROWTH_PRESETS["recommended"])
    settings = replace(base, **{key: value for key, value in given.items() if value is not None})
    settings.validate()
    return settings


def _check_trajectory(trajectory: Trajectory, tensors: Mapping[str, Tensor]) -> None:
    for name in trajectory.names:
        shape = tuple(trajectory.snapshots(name)[-1].shape)
        if name in tensors and shape != tuple(tensors[name].shape):
            raise ValueError(
                f"the trajectory holds {name!r} of shape {shape}, the model of "
                f"{tuple(tensors[name].shape)}: it is of another model; give this model's, or none"
            )


def _unwrap_schedulers(scheduler: Any) -> list[Any]:
    given = [] if scheduler is None else scheduler if isinstance(scheduler, Sequence) else [scheduler]
    return [getattr(one, "scheduler", one) for one in given]


def grow_live(
    model: nn.Module,
    plan: GrowthPlan,
    carry_out: CarryOut,
    *,
    family: Family | None,
    settings: GrowthConfig,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    step: int = 0,
    batch: Any = None,
    loss_fn: LossFn | None = None,
    compile_block: Callable[[nn.Module], object] = nn.Module.compile,
) -> GrowthReport:
    """As `grow`, with the migration as a function: a controller's, for example."""
    started = time.perf_counter()
    check_unwrapped(model)
    family = family or family_of(model)
    _check_before(model, family, optimizers, schedulers, settings)
    measured = None if batch is None else measure(model, batch, loss_fn, block_list(model, family))
    names_before = {id(p): name for name, p in model.named_parameters()}
    weights_before = sum(p.numel() for p in model.parameters())
    sources = list(block_list(model, family).children())
    config_before = copy.deepcopy(getattr(model, "config", None))
    state = _training_state(model, family, optimizers, step)
    migration = carry_out(state)
    notes = _notes_before(model, optimizers, plan, sources, names_before)
    made = make_blocks(model, family, plan, migration.state.tensors)
    with ExitStack() as undo:
        _install_model(undo, model, family, plan, made, state, migration)
        notes += install_depth(undo, model, family, plan.depth_before, plan.depth_after)
        tensors = _grown_tensors(model, names_before, renames(names_before.values(), plan, family))
        groups = _install_training(undo, optimizers, schedulers, tensors, migration, settings)
        new = tuple(name for key, name in tensors.name_now.items() if key not in names_before)
        _check_after(model, optimizers, new)
        notes += _fallbacks(migration, new)
        if (note := compare_with_fresh(model, family, plan, config_before)) is not None:
            notes.append(note if batch is not None else f"{note}; give a batch, and it is seen that they run")
        function = None
        if measured is not None:
            measured_after = measure(model, batch, loss_fn, block_list(model, family))
            function = function_change(measured, measured_after)
            _check_ran(plan, measured.ran, measured_after.ran, function)
            _check_function(plan, function)
        notes += _compile(made, {layer: sources[plan.layers[layer].source] for layer in made}, compile_block)
        rewarm = _rewarm(model, optimizers, new, settings)
        undo.pop_all()
    return GrowthReport(
        plan=plan,
        new_tensors=new,
        parameters_before=weights_before,
        parameters_after=sum(p.numel() for p in model.parameters()),
        groups=tuple(groups),
        moments=settings.moments,
        lr_policy=settings.lr_policy,
        rewarm_steps=settings.rewarm_steps,
        function=function,
        tensor_metrics=migration.tensor_metrics,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
        rewarm=rewarm,
    )


def _training_state(
    model: nn.Module, family: Family, optimizers: Sequence[Optimizer], step: int
) -> TrainingState:
    config = getattr(model, "config", None) if family.depth_key else None
    return TrainingState(
        config={} if config is None else settings_of(config),
        tensors=model.state_dict(),
        moments=moments_of(model, optimizers),
        step=step,
        family=family,
    )


def _install_model(
    undo: ExitStack,
    model: nn.Module,
    family: Family,
    plan: GrowthPlan,
    made: Mapping[int, nn.Module],
    state: TrainingState,
    migration: Migration,
) -> None:
    container = block_list(model, family)
    old = list(container.children())
    blocks = [made.get(layer, old[origin.source]) for layer, origin in enumerate(plan.layers)]
    install_blocks(undo, container, blocks)
    if state.config:
        install_config(undo, model.config, state.config, migration.state.config)


def _install_training(
    undo: ExitStack,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    tensors: GrownTensors,
    migration: Migration,
    settings: GrowthConfig,
) -> list[GroupChange]:
    changes: list[GroupChange] = []
    for index, optimizer in enumerate(optimizers):
        changes += grow_optimizer(undo, index, optimizer, tensors, migration.state.moments, settings.moments)
    if settings.lr_policy == "restart":
        restart_schedulers(undo, schedulers)
    return changes


def _rewarm(
    model: nn.Module, optimizers: Sequence[Optimizer], new: Sequence[str], settings: GrowthConfig
) -> Rewarm | None:
    if settings.lr_policy not in ("rewarm_new", "rewarm_all"):
        return None
    return Rewarm(model, optimizers, new, settings.lr_policy, settings.rewarm_steps)


def _grown_tensors(
    model: nn.Module, names_before: dict[int, str], new_names: dict[str, tuple[str, ...]]
) -> GrownTensors:
    parameters = dict(model.named_parameters())
    made = {name for name, p in parameters.items() if id(p) not in names_before}  # tied ones are not made
    new_of = {old: [new for new in names[1:] if new in made] for old, names in new_names.items()}
    return GrownTensors(names_before, parameters, new_of)


def _check_before(
    model: nn.Module,
    family: Family,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    settings: GrowthConfig,
) -> None:
    block_list(model, family)
    check_in_place(model, family)
    check_no_other_config(model, family)
    if isinstance(model, PreTrainedModel):
        check_blocks(model, family)
    if optimizers:
        check_covers(model, optimizers)
    check_rewarm(settings.lr_policy, optimizers)
    for scheduler in schedulers:
        driven = getattr(scheduler, "optimizer", None)
        if getattr(driven, "optimizer", driven) not in optimizers:
            raise ValueError(
                f"the {type(scheduler).__name__} does not drive the optimizer that was given: give the one "
                "that it was built with"
            )
    if settings.lr_policy != "unchanged" and not optimizers:
        raise ValueError(f"lr_policy={settings.lr_policy!r} needs the optimizer")
    if settings.lr_policy == "restart" and not schedulers:
        raise ValueError("lr_policy='restart' needs the scheduler")


def _check_after(model: nn.Module, optimizers: Sequence[Optimizer], new: Sequence[str]) -> None:
    if not new:
        raise GrowthError("the growth made no new tensor")
    if optimizers:
        check_covers(model, optimizers)


def _check_function(plan: GrowthPlan, function: FunctionChange) -> None:
    """`zero` adds exact zeros: a gap beyond rounding says that something else writes into the stream."""
    if plan.init == "zero" and not function.relative_gap <= 1e-3:
        raise GrowthError(
            f"init 'zero' did not keep the model's function (gap {function.relative_gap:.2%} of the output): "
            "a block writes into the residual stream by more than the family names (an adapter, a patched "
            "forward); name all of it, family_of(model, output_projections=(...)), or choose another init"
        )


def _check_ran(
    plan: GrowthPlan, before: Sequence[bool], after: Sequence[bool], function: FunctionChange
) -> None:
    """A loop over a number of layers that growth does not know leaves layers out."""
    idle = [layer for layer, ran in enumerate(after) if not ran]
    if all(before) and idle:
        raise GrowthError(
            f"layers {idle} of the grown model do not run: it states its depth of {plan.depth_before} in a "
            "place that growth does not know; let its forward pass loop over the list of blocks itself"
        )
    # Where blocks are not called as modules, the output alone tells.
    if plan.init != "zero" and function.gap == 0 and not any(after[layer] for layer in plan.new_layers):
        raise GrowthError(
            "no new layer does anything to the output of this batch: it does not pass through the blocks, or "
            "the model leaves new ones out; give a batch that passes through them, or leave it out"
        )


def _fallbacks(migration: Migration, new: Sequence[str]) -> list[str]:
    measured = [migration.tensor_metrics.get(name, {}) for name in new]
    found = Counter(entry["fallback"] for entry in measured if "fallback" in entry)
    return [
        f"{count} of {len(new)} new tensors are not initialised by {migration.plan.init!r} but by {reason}: "
        "give a trajectory of this model"
        for reason, count in found.items()
    ]


def _compile(
    made: Mapping[int, nn.Module],
    sources: Mapping[int, nn.Module],
    compile_block: Callable[[nn.Module], object],
) -> list[str]:
    compiled = compile_likewise(made, sources, compile_block)
    if not compiled or compile_block is not nn.Module.compile:
        return []
    return [
        f"{compiled} modules of new blocks were compiled with compile()'s default settings: if those of the "
        "others have settings of their own, give compile_block=lambda block: block.compile(...)"
    ]


def _notes_before(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    plan: GrowthPlan,
    sources: Sequence[nn.Module],
    names_before: dict[int, str],
) -> list[str]:
    notes: list[str] = []
    place = {key: position for position, key in enumerate(names_before)}
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in held if id(p) not in names_before]
    if foreign:
        notes.append(
            f"the optimizers also hold {len(foreign)} tensors that are not this model's: left as they are"
        )
    if not all(is_ordered(g["params"], place) for optimizer in optimizers for g in optimizer.param_groups):
        notes.append(
            "a param group is not in the model's order: an optimizer built anew over the grown model may "
            "have another order, and torch loads saved states by position"
        )
    hooks = sum(count_hooks(sources[plan.layers[layer].source]) for layer in plan.new_layers)
    if hooks:
        notes.append(
            f"{hooks} hooks of source blocks were not copied: register them on the new blocks if needed"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        notes.append("in a process group: wrap the model again (DistributedDataParallel) on every rank")
    return notes
