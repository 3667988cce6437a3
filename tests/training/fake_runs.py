"""Run folders made up for the report's tests, in the documented file formats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml


@dataclass(frozen=True)
class FakeRun:
    """What to make up. `growths` are (step, depth after), each one stacking copies on top."""

    steps: int = 2000
    start_depth: int = 2
    growths: tuple[tuple[int, int], ...] = ((500, 4), (1100, 8))
    name_in_config: str = "recommended"
    thresholds: str = "normalised"
    prompt: str = "def main("
    seed: int = 0
    interrupted_at: int | None = None
    geometry: bool = True
    samples: bool = True
    tensors_per_layer: Sequence[str] = field(default=("attn.c_attn.weight", "mlp.c_proj.weight"))

    def depth_at(self, step: int) -> int:
        return [self.start_depth, *[depth for at, depth in self.growths if at < step]][-1]


def write_fake_run(folder: Path, fake: FakeRun) -> Path:
    """A run folder in the documented file formats."""
    folder.mkdir(parents=True, exist_ok=True)
    end = fake.interrupted_at or fake.steps
    metrics = list(_metric_rows(fake, end))
    growths = [(step, depth) for step, depth in fake.growths if step <= end]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "events.jsonl", _events(fake, growths))
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(fake)), encoding="utf-8")
    environment = {"python": "3.11.2", "torch": "2.13.0", "device": {"name": "cpu", "threads": 2}}
    (folder / "environment.json").write_text(json.dumps(environment))
    records = _records(fake.start_depth, growths)
    (folder / "lineage.json").write_text(json.dumps({"records": records, "steps": fake.steps}))
    if fake.samples:
        text = f"{fake.prompt}argv):\n    parser = <b>make</b>(argv)\n    return 0 & 1"
        ends = [*(step for step, _ in growths), end]
        rows = [
            {"step": step, "depth": fake.depth_at(step), "prompt": fake.prompt, "text": text} for step in ends
        ]
        write_lines(folder / "samples.jsonl", rows)
    if fake.interrupted_at is None:
        last = [row for row in metrics if row["kind"] == "eval"][-1]
        kept = ("eval_loss", "bits_per_byte", "flops", "tokens", "elapsed_s", "depth")
        summary = {"status": "finished", "steps": end, "baselines": [], **{key: last[key] for key in kept}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _config(fake: FakeRun) -> dict[str, Any]:
    return {
        "preset": fake.name_in_config,
        "trigger": "geometric" if fake.geometry else "never",
        "thresholds": fake.thresholds,
        "tau_crit": 0.5 if fake.thresholds == "normalised" else 2.0,
        "kappa_crit": 0.5,
        "n_layer": fake.start_depth,
        "max_layers": 8,
        "lr": 1e-3,
        "growth_fractions": [0.2, 0.5],
        "dataset_path": None,
    }


def _metric_rows(fake: FakeRun, end: int) -> Iterable[dict[str, Any]]:
    rng = np.random.default_rng(fake.seed)
    elapsed = flops = 0.0
    since = 0
    for step in range(1, end + 1):
        depth = fake.depth_at(step)
        since = 0 if step > 1 and depth != fake.depth_at(step - 1) else since + 1
        elapsed += 0.02 + 0.008 * depth
        flops += 6.0 * 16 * 128 * (530_000 + 200_000 * depth)
        capacity = 1.9 + 1.2 / depth**0.5
        shock = 1.6 * math.exp(-since / 25) * (step > fake.growths[0][0] if fake.growths else 0)
        loss = capacity + 6.0 * math.exp(-step / 60) + 2.4 * (1 + step / 60) ** -0.7 + shock
        common = {"step": step, "depth": depth, "flops": flops, "tokens": step * 2048, "elapsed_s": elapsed}
        if step % 5 == 0:
            yield _train_row(common, loss, shock, depth, rng)
        if step % 50 == 0:
            yield _eval_row(common, loss, depth, since, fake.geometry, rng)


def _train_row(common: dict[str, Any], loss: float, shock: float, depth: int, rng: Any) -> dict[str, Any]:
    rate = 1 / (0.02 + 0.008 * depth) * rng.normal(1, 0.03)
    return {
        "kind": "train",
        **common,
        "loss": loss + rng.normal(0, 0.09),
        "grad_norm": 0.6 + shock + rng.gamma(2, 0.08),
        "learning_rate": 1e-3,
        "steps_per_s": rate if common["step"] > 5 else None,
        "tokens_per_s": rate * 2048 if common["step"] > 5 else None,
        "stage": 0,
    }


def _eval_row(
    common: dict[str, Any], loss: float, depth: int, since: int, geometry: bool, rng: Any
) -> dict[str, Any]:
    window = min(15, since // 50 + 1)
    row = {"kind": "eval", **common, "eval_loss": loss + 0.06 + rng.normal(0, 0.012)}
    row |= {"bits_per_byte": row["eval_loss"] / 2.3, "eval_steps_per_s": 120 / (1 + depth)}
    measures = dict.fromkeys(("tau", "kappa", "tau_normalised", "kappa_normalised", "rho", "rho_straight"))
    if geometry and window >= 3:
        tau_hat = 0.25 + 0.45 * (1 - math.exp(-since / 400)) + rng.normal(0, 0.015)
        kappa_hat = tau_hat + 0.06 + rng.normal(0, 0.015)
        measures = {
            "tau_normalised": tau_hat,
            "kappa_normalised": kappa_hat,
            "tau": 1 + tau_hat * (math.sqrt(window - 1) - 1),
            "kappa": kappa_hat * math.sqrt(window - 2),
            "rho": 0.3,
            "rho_straight": (window + 1) / (3 * (window - 1)),
        }
    return row | measures | {"stagnation": 0, "num_snapshots": window if geometry else None}


def _events(fake: FakeRun, growths: Sequence[tuple[int, int]]) -> Iterable[dict[str, Any]]:
    yield {"event": "start", "step": 0, "depth": fake.start_depth}
    depth = fake.start_depth
    for step, after in growths:
        layers = [{"source": index % depth, "is_new": index >= depth} for index in range(after)]
        names = [
            f"transformer.h.{i}.{suffix}" for i in range(depth, after) for suffix in fake.tensors_per_layer
        ]
        yield {
            "event": "growth",
            "step": step,
            "depth_before": depth,
            "depth_after": after,
            "reason": "tau 0.55 >= 0.5 and kappa 0.61 >= 0.5 at 5 evaluations in a row",
            "plan": {"depth_before": depth, "layers": layers, "init": "geometric", "placement": "stack"},
            "loss_before": 3.412 - step / 5000,
            "loss_after": 4.98 - step / 5000,
            "tensors": {name: {"beta": 0.0123456, "rank": 14, "k_used": 10} for name in names},
            "seconds": 0.41,
        }
        yield {"event": "phase", "step": step, "trainable": list(range(depth, after))}
        yield {"event": "phase", "step": step + 100, "trainable": "all"}
        depth = after


def _records(start: int, growths: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    records = [_record(index, 0, None) for index in range(start)]
    for step, after in growths:
        before = len(records)
        new = [_record(index, step, records[index % before]["id"]) for index in range(before, after)]
        records = [*records, *new]
    return records


def _record(layer_id: int, born: int, parent: int | None) -> dict[str, Any]:
    init = "random" if parent is None else "geometric"
    return {"id": layer_id, "born_step": born, "parent": parent, "init": init, "placement": "stack"}


STATIC = FakeRun(steps=1500, start_depth=8, growths=(), geometry=False, seed=1)
