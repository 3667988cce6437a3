"""One arm of a study of retrofitted models: from the study's own model to a converted and tuned one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from aiether.data import PackedData, TokenWindows, prepare
from aiether.evaluation import bits_per_byte, flops_per_token, sum_losses
from aiether.integrations import hold, without_progress_bars, write_json
from aiether.toroidal import ToroidalSettings, attention_modules, retrofit
from aiether.training.arms import tokens_per_step
from aiether.training.config import TrainConfig, write_config
from aiether.training.environment import environment
from aiether.training.generate import find_device

from .config import TuneConfig
from .job import told_terms
from .loop import Tuned, tune
from .order import shuffled

Variant = Literal["torus", "adapters", "untouched", "random_swap"]
_FROM_TRAINING = ("steps", "transfer_steps", "batch_size", "accumulation", "lr", "bf16", "seed")
"""Of the tuning: given by the study's base, budget and seed."""


@dataclass(frozen=True)
class ArmSettings:
    """What a condition's `retrofit` says; fields of `ToroidalSettings` and `TuneConfig` stand beside these.

    Attributes
    ----------
    variant: `torus`; or a control: `adapters`, the same tuning without a torus; `untouched`, none at all;
        `random_swap`, as the reference did it: attention of the layers with random weights, on the torus
        from the first step.
    layers: which; None: all.
    transfer: share of the steps that are layer-wise transfer.
    train_size: windows that are tuned on, over and over; None: all there are.
    """

    variant: Variant = "torus"
    layers: tuple[int, ...] | None = None
    transfer: float = 0.33
    train_size: int | None = None
    settings: ToroidalSettings = field(default_factory=ToroidalSettings)
    tuning: Mapping[str, Any] = field(default_factory=dict)


def arm_settings(given: Mapping[str, Any]) -> ArmSettings:
    """A condition's `retrofit` as plain values.

    Raises
    ------
    ValueError
        Naming a setting that is unknown, that the study gives itself, or that cannot be.
    """
    own = {each.name for each in fields(ArmSettings)} - {"settings", "tuning"}
    torus = {each.name for each in fields(ToroidalSettings)}
    tuned = {each.name for each in fields(TuneConfig)} - {*_FROM_TRAINING, "save_interval"}
    unknown = sorted(given.keys() - own - torus - tuned)
    if unknown:
        raise ValueError(
            f"retrofit has no setting {unknown[0]!r}; there are {', '.join(sorted(own | torus | tuned))}"
        )
    plain = {name: given[name] for name in own & given.keys()}
    if plain.get("layers") is not None:
        plain["layers"] = tuple(plain["layers"])
    if plain.get("variant", "torus") not in get_args(Variant):
        raise ValueError(f"variant is {plain['variant']!r}: choose one of {', '.join(get_args(Variant))}")
    if not 0 <= plain.get("transfer", 0) <= 1:
        raise ValueError(f"transfer is {plain['transfer']}: a share of the steps from 0 to 1 is meant")
    settings = ToroidalSettings(**{name: given[name] for name in torus & given.keys()})
    return ArmSettings(**plain, settings=settings, tuning={n: given[n] for n in tuned & given.keys()})


def tuning_of(arm: ArmSettings, config: TrainConfig) -> TuneConfig:
    """The tuning: its form from the condition, its budget from the study."""
    assert config.max_steps is not None
    transfer = 0 if arm.variant in ("adapters", "random_swap") else round(arm.transfer * config.max_steps)
    chosen: dict[str, Any] = dict(arm.tuning)
    if arm.variant == "random_swap":
        chosen |= {"ramp": 0.0, "tune": "full", "kl_weight": 0.0}
    return TuneConfig(
        **chosen,
        transfer_steps=transfer,
        steps=config.max_steps - transfer,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        lr=config.lr,
        bf16=config.bf16,
        seed=config.seed,
    )


def run_arm(folder: Path, config: TrainConfig, given: Mapping[str, Any], base: Path) -> None:
    """Convert and tune the model in `base`, and write the records of a run; goes on where it was stopped.

    Args:
        config: the study's settings: data, windows, batches, learning rate, steps, seed.
        given: the condition's `retrofit`.
    """
    arm = arm_settings(given)
    data = prepare(config)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        if not (folder / "config.yaml").is_file():
            write_json(folder / "environment.json", environment(data))
            write_config(folder / "config.yaml", config)
        with without_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
        model.to(find_device(config.device)).eval()
        records = _Records(folder, config, data, model)
        records.evaluated(0, model, 0.0)
        layers = arm.layers if arm.layers is not None else tuple(range(model.config.num_hidden_layers))
        started = time.perf_counter()
        tuned = _changed(arm, config, model, layers, data, folder)
        elapsed_s = time.perf_counter() - started
        records.finish(model, tuned, elapsed_s)


def _changed(
    arm: ArmSettings,
    config: TrainConfig,
    model: Any,
    layers: tuple[int, ...],
    data: PackedData,
    folder: Path,
) -> Tuned:
    """Convert the model as the variant says, and tune it."""
    if arm.variant == "untouched":
        return Tuned()
    settings = arm.settings
    if arm.variant == "adapters":
        settings = ToroidalSettings(platters=1, lambda_distance=0.0, token_lambda=False)
    torch.manual_seed(config.seed)
    if arm.variant == "random_swap":
        _draw_anew(model, layers)
    retrofit(model, layers=layers, settings=settings)
    batches = _batches(config, data, arm.train_size)
    return tune(model, batches, tuning_of(arm, config), state_dir=folder / "state")


def _draw_anew(model: Any, layers: tuple[int, ...]) -> None:
    """Random attention weights, as a fresh model has them."""
    for attention in attention_modules(model, layers):
        for module in attention.modules():
            if isinstance(module, nn.Linear | Conv1D):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _batches(config: TrainConfig, data: PackedData, train_size: int | None) -> Any:
    """Windows of the training text in the seed's order; of the first `train_size` of it, again and again."""
    windows = TokenWindows(data.train, config.context_length, config.seed)
    count = len(windows) if train_size is None else train_size
    if count > len(windows):
        raise ValueError(f"train_size is {count}, and the text holds {len(windows)} windows: lower it")

    def batch(number: int) -> Tensor:
        order = shuffled(number, config.batch_size, count, config.seed * 7919)
        return torch.stack([windows[index]["input_ids"] for index in order])

    return batch


class _Records:
    """What a run leaves behind, in the form of `aiether train`."""

    def __init__(self, folder: Path, config: TrainConfig, data: PackedData, model: Any) -> None:
        self.folder, self.config = folder, config
        self.bytes_per_token, self.depth = data.bytes_per_token, model.config.num_hidden_layers
        count = config.eval_batches * config.batch_size
        self.windows = TokenWindows(data.validation, config.context_length, None, count)
        self.flops_per_step = tokens_per_step(config) * flops_per_token(model.config, config.context_length)
        self.rows: list[dict[str, Any]] = []

    def evaluated(self, step: int, model: Any, elapsed_s: float) -> None:
        """An evaluation on the validation windows; FLOPs are those of the model without its torus."""
        counted = ((self.windows[index]["input_ids"], 1) for index in range(len(self.windows)))
        began = time.perf_counter()
        batch, bf16 = self.config.batch_size, self.config.bf16
        loss = sum_losses(model.eval(), counted, batch_size=batch, bf16=bf16).loss
        bits = None if self.bytes_per_token is None else bits_per_byte(loss, 1, self.bytes_per_token)
        self.rows.append(
            {
                "kind": "eval",
                "step": step,
                "stage": 0,
                "depth": self.depth,
                "eval_loss": loss,
                "bits_per_byte": bits,
                "eval_seconds": time.perf_counter() - began,
                "tokens": step * tokens_per_step(self.config),
                "flops": step * self.flops_per_step,
                "elapsed_s": elapsed_s,
            }
        )

    def finish(self, model: Any, tuned: Tuned, elapsed_s: float) -> None:
        steps = len(tuned.rows)
        self.rows += [self._trained(row, row["loss" if "loss" in row else "transfer"]) for row in tuned.rows]
        self.evaluated(steps, model, elapsed_s)
        last = self.rows[-1]
        if not math.isfinite(last["eval_loss"]):
            raise ValueError("the loss after tuning is not finite: choose smaller rates")
        self._write_rows()
        result = {"name": "grown", "status": "finished", "depth": self.depth, "steps": steps, "growths": 0}
        kept = ("eval_loss", "bits_per_byte", "tokens", "flops", "elapsed_s")
        result |= {name: last[name] for name in kept}
        terms = told_terms(model) if getattr(model.config, "toroidal", None) else []
        write_json(self.folder / "retrofit.json", {"trained_parameters": tuned.trained, "terms": terms})
        write_json(self.folder / "result.json", result)
        write_json(self.folder / "summary.json", {"status": "finished"})

    def _trained(self, row: Mapping[str, Any], loss: float) -> dict[str, Any]:
        step = row["step"]
        return {
            "kind": "train",
            "step": step,
            "stage": 0,
            "depth": self.depth,
            "loss": loss,
            "tokens": step * tokens_per_step(self.config),
            "flops": step * self.flops_per_step,
            **{name: row[name] for name in ("transfer", "divergence", "progress") if name in row},
        }

    def _write_rows(self) -> None:
        path = self.folder / "metrics.jsonl"
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        partial.replace(path)
        (self.folder / "events.jsonl").write_text("", encoding="utf-8")
