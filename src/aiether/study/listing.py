"""What the shipped studies consist of, and about how long this machine would take for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiether.training.arms import tokens_per_step
from aiether.training.config import TrainConfig
from aiether.training.model import build_model
from aiether.training.settings_file import read_settings_file

from .arms import Cell, cells, tuning_cells
from .catalogue import find_file, find_spec, shipped_names
from .check import Arm, check_spec, planned_flops, shapes
from .spec import StudySpec, presets_of

_PROBE_STEPS = 3


@dataclass(frozen=True)
class Listed:
    """A study under one of its presets. `flops`: of training, at most; `seconds`: None without its GPU."""

    name: str
    preset: str | None
    question: str
    runs: int
    flops: float | None
    seconds: float | None


def listed() -> Iterator[Listed]:
    """Every shipped study under each of its presets."""
    for name in shipped_names():
        for preset in presets_of(read_settings_file(find_file(name))) or (None,):
            yield _entry(find_spec(name, preset))


def _entry(spec: StudySpec) -> Listed:
    configs = check_spec(spec)
    arms = {name: Arm(name, config, shapes(config, config.vocab_size)) for name, config in configs.items()}
    wanted = (*tuning_cells(spec), *cells(spec, {}))
    flops = [planned_flops(spec, arms, cell) for cell in wanted]
    total = None if None in flops else sum(each for each in flops if each is not None)
    return Listed(
        spec.name, spec.preset, spec.question, len(wanted), total, _seconds(spec, arms, wanted, total)
    )


def _seconds(
    spec: StudySpec, arms: Mapping[str, Arm], wanted: tuple[Cell, ...], flops: float | None
) -> float | None:
    """Training alone, one run at a time; None for a study that asks for a GPU where there is none."""
    config = next(iter(arms.values())).config
    if config.device == "cuda" and not torch.cuda.is_available():
        return None
    if spec.budget_unit == "seconds":
        return sum(spec.budget * cell.length for cell in wanted)
    assert flops is not None
    dearest = max(arms.values(), key=lambda arm: arm.end.flops_per_token)
    return flops / flops_per_second(dearest)


def flops_per_second(arm: Arm) -> float:
    """Training FLOPs a second of an arm's largest model here, by a few steps on random tokens."""
    config, device = arm.config, device_of(arm.config)
    model: Any = build_model(
        config.arch,
        n_layer=arm.end.depth,
        n_head=config.n_head,
        n_embd=config.n_embd,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        dropout=config.dropout,
        eos_token_id=None,
        lahr=config.lahr_settings(),
        final_depth=arm.end.depth,
        seed=0,
    )
    model = model.to(device)
    ids = torch.randint(config.vocab_size, (config.batch_size, config.context_length), device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    started = 0.0
    for step in range(_PROBE_STEPS + 1):
        if step == 1:  # the first one allocates
            started = _now(device)
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = tokens_per_step(config) / config.gradient_accumulation_steps
    return _PROBE_STEPS * tokens * arm.end.flops_per_token / (_now(device) - started)


def device_of(config: TrainConfig) -> str:
    """The device type that a run of this configuration takes here."""
    if config.device != "auto":
        return config.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
