"""One arm of a run: a model trained under a fixed recipe in its own folder, to the end or to an interrupt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from aiether.data import PackedData, TokenWindows
from aiether.evaluation import flops_per_token
from aiether.growth import GrowthConfig, planned_depth
from aiether.integrations import (
    Row,
    StepBudget,
    Workload,
    check_memory,
    fit,
    whole_folder,
    without_progress_bars,
    write_json,
)

from .config import TrainConfig
from .model import build_model, model_config
from .recorder import Recorder
from .run_folder import read_record
from .samples import Sampler
from .trainer import build_trainer

RESULT = "result.json"
Emit = Callable[[str, Row], None]


@dataclass(frozen=True)
class ArmLength:
    """How many steps an arm has.

    Attributes
    ----------
    steps: as planned at its start.
    most_steps: as many as it may have under any later plan; None: `steps`.
    budget: makes what plans them again while the arm trains, from what the recorder has counted.
    """

    steps: int
    most_steps: int | None = None
    budget: Callable[[Recorder], StepBudget] | None = None


@dataclass(frozen=True)
class ArmResult:
    """What an arm cost and reached. `flops` count head and attention, forward and backward."""

    name: str
    status: Literal["finished", "interrupted"]
    depth: int
    steps: int
    growths: int
    eval_loss: float | None
    bits_per_byte: float | None
    tokens: int
    flops: int
    elapsed_s: float
    signal: str | None = None  # the signal that interrupted it, as in "SIGTERM"

    @classmethod
    def read(cls, arm_dir: Path) -> ArmResult | None:
        """The result of an arm that finished earlier."""
        path = arm_dir / RESULT
        advice = "move it away and resume again: the run goes on from its newest checkpoint"
        return read_record(path, lambda read: cls(**read), advice) if path.is_file() else None


def tokens_per_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps * config.context_length


def final_depth(config: TrainConfig) -> int:
    return planned_depth(config, config.n_layer)


def new_model(config: TrainConfig, data: PackedData, depth: int) -> PreTrainedModel:
    settings = model_settings(config, depth, data.vocab_size, data.eos_token_id)
    return build_model(config.arch, final_depth=final_depth(config), seed=config.seed, **settings)


def model_settings(
    config: TrainConfig, depth: int, vocab_size: int, eos_token_id: int | None
) -> dict[str, Any]:
    return {
        "n_layer": depth,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "context_length": config.context_length,
        "vocab_size": vocab_size,
        "dropout": config.dropout,
        "eos_token_id": eos_token_id,
        "lahr": config.lahr_settings(),
    }


def flops_per_step(config: TrainConfig, data: PackedData, depth: int) -> int:
    """Training FLOPs of one optimizer step of a model of `depth` layers, head and attention included."""
    settings = model_settings(config, depth, data.vocab_size, data.eos_token_id)
    model = model_config(config.arch, **settings)
    per_token = flops_per_token(model, config.context_length, config.batch_size)
    return per_token * tokens_per_step(config)


def check_final_depth(config: TrainConfig, data: PackedData, device: torch.device) -> None:
    """Refuse a run whose planned final depth does not fit into the memory that is free."""
    work = Workload(
        batch_size=config.batch_size,
        context_length=config.context_length,
        accumulation=config.gradient_accumulation_steps,
        moments_per_weight=2 if config.optimizer == "adamw" else 1,
        bf16=config.bf16,
    )
    check_memory(new_model(config, data, config.n_layer), config, work, device)


def replays_graphs(config: TrainConfig, device: str) -> bool:
    """Whether blocks run as CUDA graphs: where they can, unless the user says no."""
    one_pass = config.gradient_accumulation_steps == 1
    return config.cuda_graphs and config.compile and device == "cuda" and one_pass


def run_arm(
    name: str,
    config: TrainConfig,
    growth: GrowthConfig,
    data: PackedData,
    arm_dir: Path,
    *,
    depth: int,
    length: ArmLength,
    resume: bool,
    emit: Emit,
) -> ArmResult:
    """Train from `depth` layers for `length`; with `resume`, from the newest complete checkpoint."""
    arm_dir.mkdir(parents=True, exist_ok=True)
    if not resume:
        for record in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
            (arm_dir / record).unlink(missing_ok=True)
    train, validation = windows(config, data, length.most_steps or length.steps)
    trainer = build_trainer(
        config, new_model(config, data, depth), train, validation, max_steps=length.steps, output_dir=arm_dir
    )
    recorder = Recorder(
        arm_dir,
        context_length=config.context_length,
        batch_size=config.batch_size,
        tokens_per_step=tokens_per_step(config),
        total_steps=length.steps,
        bytes_per_token=data.bytes_per_token,
        config=asdict(config),
        emit=emit,
        sampler=sampler(config, data),
    )
    assert trainer.model is not None
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    emit("start", {"arm": name, "total_steps": length.steps, "depth": depth, "parameters": parameters})
    try:
        result = fit(
            trainer,
            growth,
            output_dir=arm_dir,
            resume=resume,
            observers=[recorder],
            compile=config.compile,
            cuda_graphs=replays_graphs(config, trainer.args.device.type),
            on_nan=config.on_nan,
            max_skipped_steps=config.max_skipped_steps,
            budget=length.budget and length.budget(recorder),
        )
        recorder.write_all()
    finally:
        recorder.close()
    if result.status == "finished":
        export(result.model, data.tokenizer_dir, arm_dir / "final")
    arm = ArmResult(
        name=name,
        status=result.status,
        depth=result.depth,
        steps=result.step,
        growths=result.num_growths,
        eval_loss=recorder.last_eval.get("eval_loss"),
        bits_per_byte=recorder.last_eval.get("bits_per_byte"),
        tokens=recorder.tokens,
        flops=recorder.flops,
        elapsed_s=result.train_seconds,
        signal=result.signal,
    )
    if result.status == "finished":
        write_json(arm_dir / RESULT, asdict(arm))
    return arm


def windows(config: TrainConfig, data: PackedData, max_steps: int) -> tuple[TokenWindows, TokenWindows]:
    """What the run trains on, in its order, and what it is evaluated on; each holds a window or raises."""
    sequences = max_steps * config.batch_size * config.gradient_accumulation_steps
    train = TokenWindows(data.train, config.context_length, seed=config.seed, num_windows=sequences)
    available = len(data.validation) // config.context_length
    wanted = min(config.eval_batches * config.batch_size, available)
    return train, TokenWindows(data.validation, config.context_length, seed=None, num_windows=wanted)


def sampler(config: TrainConfig, data: PackedData) -> Sampler | None:
    """What draws the run's text samples; None for tokens without a tokenizer."""
    if data.tokenizer_dir is None:
        return None
    return Sampler(data.tokenizer_dir, config.sample_prompt, config.seed)


def static_steps(config: TrainConfig, data: PackedData, *, depth: int, flops: int) -> int:
    """Steps that a static model of `depth` layers takes within `flops`."""
    return max(1, round(flops / flops_per_step(config, data, depth)))


def export(model: PreTrainedModel, tokenizer_dir: Path | None, directory: Path) -> None:
    """Write the model and its tokenizer as a folder that `from_pretrained` loads without aiether."""
    model.config.use_cache = True  # off while training; generation wants it
    try:
        with whole_folder(directory) as folder, without_progress_bars():
            model.save_pretrained(folder)
            if tokenizer_dir is not None:
                shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    finally:
        model.config.use_cache = False
