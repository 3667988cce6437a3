"""One arm of a study of retrofitted models: from the study's own model to a converted and tuned one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from aiether.training.environment import environment, source_of
from aiether.training.generate import find_device

from .arm_settings import ArmSettings, arm_settings, tuning_of
from .arm_text import TUNED_ON, text_of, windows_of
from .job import told_terms
from .loop import Tuned, tune
from .order import shuffled
from .suggest import SAMPLE, cheapest, layer_costs


def run_arm(
    folder: Path, config: TrainConfig, given: Mapping[str, Any], base: Path, *, keep_model: bool = False
) -> None:
    """Convert and tune the model in `base`, and write the records of a run; goes on where it was stopped.

    Args:
        config: the study's settings: data, windows, batches, learning rate, steps, seed.
        given: the condition's `retrofit`.
        keep_model: write what the converted model differs in from `base` too, to `final/`.
    """
    arm = arm_settings(given)
    data = prepare(config)
    text = text_of(arm, config, data)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        if not (folder / "config.yaml").is_file():
            own = {} if arm.dataset_path is None else {TUNED_ON: source_of(text)}
            write_json(folder / "environment.json", environment(data) | own)
            write_config(folder / "config.yaml", config)
        with without_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
        model.to(find_device(config.device)).eval()
        records = _Records(folder, config, data, model, arm)
        records.evaluated(0, model, 0.0)
        layers = _layers(arm, config, model, text)
        tuned = _changed(arm, config, model, layers, text, folder)
        if keep_model and arm.variant != "untouched":
            model.save_pretrained(folder / "final")
        records.finish(model, tuned)


def _changed(
    arm: ArmSettings,
    config: TrainConfig,
    model: Any,
    layers: tuple[int, ...],
    text: PackedData,
    folder: Path,
) -> Tuned:
    """Convert the model as the variant says, and tune it."""
    if arm.variant == "untouched":
        return Tuned()
    if arm.variant == "identity":
        retrofit(model, layers=layers, settings=arm.settings)
        return Tuned()
    settings = arm.settings
    if arm.variant == "adapters":
        settings = ToroidalSettings(platters=1, lambda_distance=0.0, token_lambda=False)
    torch.manual_seed(config.seed)
    if arm.variant == "random_swap":
        _draw_anew(model, layers)
    retrofit(model, layers=layers, settings=settings)
    batches = _batches(arm, config, text)
    return tune(model, batches, tuning_of(arm, config), state_dir=folder / "state")


def _layers(arm: ArmSettings, config: TrainConfig, model: Any, text: PackedData) -> tuple[int, ...]:
    """The layers that are converted; those suggested cost least on a few windows of the text to tune on."""
    if arm.layers is not None:
        return arm.layers
    if arm.suggest_layers is None:
        return tuple(range(model.config.num_hidden_layers))
    windows, _ = windows_of(arm, config, text)
    sample = [windows[index]["input_ids"][None] for index in range(min(SAMPLE, len(windows)))]
    return tuple(cheapest(layer_costs(model, sample, arm.settings), arm.suggest_layers))


def _draw_anew(model: Any, layers: tuple[int, ...]) -> None:
    """Random attention weights, as a fresh model has them."""
    for attention in attention_modules(model, layers):
        for module in attention.modules():
            if isinstance(module, nn.Linear | Conv1D):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _batches(arm: ArmSettings, config: TrainConfig, text: PackedData) -> Any:
    """Windows to tune on in the seed's order; of the first `train_size` of the text, again and again."""
    windows, count = windows_of(arm, config, text)

    def batch(number: int) -> Tensor:
        order = shuffled(number, config.batch_size, count, config.seed * 7919)
        return torch.stack([windows[index]["input_ids"] for index in order])

    return batch


class _Records:
    """What a run leaves behind, in the form of `aiether train`."""

    def __init__(
        self, folder: Path, config: TrainConfig, data: PackedData, model: Any, arm: ArmSettings
    ) -> None:
        self.folder, self.config = folder, config
        self.bytes_per_token, self.depth = data.bytes_per_token, model.config.num_hidden_layers
        count = config.eval_batches * config.batch_size
        self.windows = TokenWindows(data.validation, config.context_length, None, count)
        per_token = flops_per_token(model.config, config.context_length) + arm.flops_per_token(config)
        self.flops_per_step = tokens_per_step(config) * per_token
        self.rows: list[dict[str, Any]] = []

    def evaluated(self, step: int, model: Any, elapsed_s: float) -> None:
        """An evaluation on the validation windows; FLOPs are of the model's own passes, not its teacher's."""
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

    def finish(self, model: Any, tuned: Tuned) -> None:
        steps = len(tuned.rows)
        self.rows += [self._trained(row, row["loss" if "loss" in row else "transfer"]) for row in tuned.rows]
        self.evaluated(steps, model, tuned.seconds)
        last = self.rows[-1]
        if not math.isfinite(last["eval_loss"]):
            raise ValueError("the loss after tuning is not finite: choose smaller rates")
        self._write_rows()
        result = {"name": "grown", "status": "finished", "depth": self.depth, "steps": steps, "growths": 0}
        kept = ("eval_loss", "bits_per_byte", "tokens", "flops", "elapsed_s")
        result |= {name: last[name] for name in kept}
        told: dict[str, Any] = {"trained_parameters": tuned.trained, "layers": [], "terms": []}
        if getattr(model.config, "toroidal", None):
            told |= {"layers": model.config.toroidal["layers"], "terms": told_terms(model)}
        write_json(self.folder / "retrofit.json", told)
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
