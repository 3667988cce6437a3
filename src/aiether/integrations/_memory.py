"""Before a run starts: does its largest planned depth fit into memory?

Running out of memory after hours, at the last growth, is the costliest way to learn it. Weights, gradients,
optimizer moments and the window of snapshots follow from the shapes. What a forward pass keeps for the
backward one is measured: on a CPU with one sequence, counted by autograd itself and scaled up; on a GPU by a
real trial, since its kernels keep what they like.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aiether.growth import (
    GrowthConfig,
    depth_schedule,
    family_of,
    grow_config,
    plan_growth,
    planned_depth,
)

from ._fault import is_out_of_memory, less_memory, size
from ._model import blocks_of

_NEAR = 0.5  # of the memory: what surely needs less is not measured
_BEYOND = 1.1  # of the memory: an estimate refuses only what is clearly too much


@dataclass(frozen=True)
class Workload:
    """What a training step consists of; `moments_per_weight`: how many the optimizer keeps, at least."""

    batch_size: int
    context_length: int
    accumulation: int
    moments_per_weight: float
    bf16: bool


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that training at one depth takes, at least."""

    depth: int
    weights: int
    moments: int
    window: int
    activations: int
    beside: int = 0  # the run's weights and moments, which wait while a probe trains forks

    @property
    def fixed(self) -> int:
        """Weights, gradients, moments, the window and what waits for a probe: all but activations."""
        return 2 * self.weights + self.moments + self.window + self.beside

    @property
    def total(self) -> int:
        return self.fixed + self.activations

    def __str__(self) -> str:
        return (
            f"{size(self.total)} (weights and gradients {size(2 * self.weights)}, moments "
            f"{size(self.moments)}, snapshots {size(self.window)}, activations {size(self.activations)}"
            f"{f', the run beside its forks {size(self.beside)}' if self.beside else ''})"
        )


def check_memory(
    model: PreTrainedModel, growth: GrowthConfig, work: Workload, device: torch.device | str
) -> None:
    """Refuse a run whose largest planned depth does not fit into the memory that is free now.

    Raises
    ------
    ValueError
        Naming the depth, what it needs, what there is, and what to lower.
    """
    device = torch.device(device)
    need = memory_need(model, growth, work, device)
    free = free_memory(device)
    if need.total + _rough_activations(model, need.depth, work) < _NEAR * free:
        return
    if device.type == "cpu":
        need = replace(need, activations=measured_activations(model, need.depth, work))
        if need.total <= _BEYOND * free:
            return
    elif device.type != "cuda" or fits(model, growth, work, device, need):
        return
    advice = less_memory(
        work.batch_size,
        work.accumulation,
        bf16=work.bf16,
        window_on_device=growth.snapshot_storage == "device" and need.window > 0,
    )
    raise ValueError(
        f"training at the largest planned depth, {need.depth} layers, needs at least {need}; "
        f"{size(free)} of memory are free: {advice}"
    )


def memory_need(
    model: PreTrainedModel, growth: GrowthConfig, work: Workload, device: torch.device
) -> MemoryNeed:
    """What the largest planned depth needs besides activations, from the shapes of `model` as it is now."""
    family, depth = family_of(model), model.config.num_hidden_layers
    final = planned_depth(growth, depth)
    block = sum(p.nbytes for p in blocks_of(model, family)[0].parameters())
    own = sum(p.nbytes for p in model.parameters())
    weights = own + (final - depth) * block
    beside = 0
    if growth.probes:
        depths = (depth, *depth_schedule(growth, depth, final_depth=final))
        smaller = own + (depths[max(len(depths) - 2, 0)] - depth) * block
        beside = int((1 + work.moments_per_weight) * smaller)
    # Beyond the trigger's own the window holds only sources of a next growth, and at the end there is none.
    watched = (final if growth.watch == "all" else 1) if growth.trigger == "geometric" else 0
    held = growth.snapshot_storage == "device" or (growth.snapshot_storage == "host" and device.type == "cpu")
    window = growth.history_window_size * watched * block if held else 0
    moments = int(work.moments_per_weight * weights)
    return MemoryNeed(final, weights, moments, window, activations=0, beside=beside)


def _rough_activations(model: PreTrainedModel, depth: int, work: Workload) -> int:
    """More than a forward pass of a usual block keeps, from the sizes alone."""
    per_token = 64 * depth * model.config.hidden_size + 8 * model.config.vocab_size
    return 4 * work.batch_size * work.context_length * per_token


def measured_activations(model: PreTrainedModel, depth: int, work: Workload) -> int:
    """Bytes that autograd keeps of a forward pass at `depth`, from one real sequence at the present depth."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}
    marks: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that none is counted twice under a used address
        return tensor

    def mark(*_: Any) -> None:
        marks.append(sum(storage.nbytes() for storage in kept.values()))

    block = blocks_of(model, family_of(model))[0]
    hooks = [block.register_forward_pre_hook(mark), block.register_forward_hook(mark)]
    try:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _forward(model, 1, work)
    finally:
        for hook in hooks:
            hook.remove()
    mark()
    whole, one_block = marks[2], marks[1] - marks[0]
    return work.batch_size * (whole + (depth - model.config.num_hidden_layers) * one_block)


def _forward(model: PreTrainedModel, batch_size: int, work: Workload) -> Tensor:
    device = model.device
    ids = torch.zeros(batch_size, work.context_length, dtype=torch.long, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if work.bf16 else nullcontext()
    with _training(model), autocast:
        return model(input_ids=ids, labels=ids, use_cache=False).loss


@contextmanager
def _training(model: PreTrainedModel) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def fits(
    model: PreTrainedModel, growth: GrowthConfig, work: Workload, device: torch.device, need: MemoryNeed
) -> bool:
    """Try it: a model of the largest planned depth, all that a step holds beside it, forward and backward."""
    config = copy.deepcopy(model.config)
    for key, value in _final_config(model, growth).items():
        if getattr(config, key, None) != value:
            setattr(config, key, value)
    held: list[Any] = []
    try:
        with torch.random.fork_rng(), torch.device(device):
            twin: Any = type(model)(config)
            twin = twin.to(model.dtype)
            held = [twin, torch.empty(need.moments + need.window + need.beside, dtype=torch.uint8)]
            _forward(twin, work.batch_size, work).backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        held.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _final_config(model: PreTrainedModel, growth: GrowthConfig) -> dict[str, Any]:
    config, depth = model.config.to_dict(), model.config.num_hidden_layers
    final = planned_depth(growth, depth)
    while plan := plan_growth(growth, depth, final_depth=final):
        config, depth = grow_config(config, plan, family_of(model)), plan.depth_after
    return config


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine, this container and this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    return min(machine, container_free(Path("/sys/fs/cgroup")))


def container_free(group: Path) -> int:
    """Bytes up to the limit of a control group (version 2); without a limit, more than there is."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = (group / "memory.stat").read_text().split()
    except OSError:
        return sys.maxsize
    cached = int(statistics[statistics.index("file") + 1])  # counts as used, and goes when memory is short
    return sys.maxsize if limit == "max" else int(limit) - int(used) + cached
