"""A run's length, as its configuration gives it, in steps."""

from __future__ import annotations

import math
from pathlib import Path

from aiether.data import PackedData
from aiether.integrations import Row

from .arms import ArmLength, Emit, final_depth, flops_per_step, tokens_per_step
from .budget import MOST_STEPS, Course, FlopsBudget, SecondsBudget
from .config import TrainConfig
from .stopwatch import seconds_per_step


def arm_length(config: TrainConfig, data: PackedData, run_dir: Path, emit: Emit) -> ArmLength:
    """The steps of the run that `config` describes, and how they are planned again.

    With `max_seconds` this trains a model that is thrown away (`seconds_per_step`), in a folder in `run_dir`.

    Raises
    ------
    ValueError
        If the budget is not enough for one step, or for more of them than a run may have.
    """
    if config.max_flops is not None:
        return _of_flops(config, data, int(config.max_flops))
    if config.max_seconds is not None:
        return _of_seconds(config, data, run_dir, emit)
    if config.max_steps is not None:
        return ArmLength(config.max_steps)
    if config.max_tokens is not None:
        return ArmLength(_counted(max(1, config.max_tokens // tokens_per_step(config)), "max_tokens"))
    windows = len(data.train) // config.context_length
    sequences = config.batch_size * config.gradient_accumulation_steps
    return ArmLength(max(1, math.ceil(config.num_epochs * windows / sequences)))


def check_length(config: TrainConfig, data: PackedData) -> None:
    """Refuse, before anything is written, a budget of tokens or FLOPs that cannot work."""
    if config.max_seconds is None:
        arm_length(config, data, Path(), _silent)


def course_of(config: TrainConfig) -> Course:
    return Course(
        config=config,
        depth=config.n_layer,
        final_depth=final_depth(config),
        seed=config.seed,
        eval_interval=config.eval_interval_steps or config.collect_interval_steps,
    )


def _of_flops(config: TrainConfig, data: PackedData, flops: int) -> ArmLength:
    course = course_of(config)
    per_step = {depth: flops_per_step(config, data, depth) for depth in course.depths}
    steps = course.steps_within(flops, per_step)
    if not steps:
        raise ValueError(
            f"max_flops is {config.max_flops:g}, and one step with {config.n_layer} layers takes "
            f"{per_step[config.n_layer]:.4g}: raise it, or make the model or the batch smaller"
        )
    _counted(steps, "max_flops")
    if course.is_known:
        return ArmLength(steps)
    return ArmLength(
        steps, budget=lambda recorder: FlopsBudget(course, flops, per_step, lambda: recorder.flops)
    )


def _of_seconds(config: TrainConfig, data: PackedData, run_dir: Path, emit: Emit) -> ArmLength:
    seconds = config.max_seconds
    assert seconds is not None
    course = course_of(config)
    depths = course.depths
    emit("message", {"text": f"measuring what a step takes with {', '.join(map(str, depths))} layers"})
    per_step = seconds_per_step(config, data, depths, run_dir)
    told = ", ".join(f"{depth} layers {1000 * took:.3g} ms" for depth, took in per_step.items())
    emit("message", {"text": f"a step takes: {told}"})
    return ArmLength(
        max(1, min(course.steps_within(seconds, per_step), MOST_STEPS)),
        most_steps=MOST_STEPS,
        budget=lambda recorder: SecondsBudget(course, seconds, per_step, config.decay_fraction),
    )


def _counted(steps: int, name: str) -> int:
    if steps > MOST_STEPS:
        raise ValueError(f"{name} is enough for more than {MOST_STEPS:,} steps: lower it")
    return steps


def _silent(kind: str, row: Row) -> None:
    """Nobody is told."""
