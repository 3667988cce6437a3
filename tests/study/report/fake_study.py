"""Study folders made up for the report's tests: cells with raw records, and a results.json over them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from tests.training.fake_runs import write_lines

Row = dict[str, Any]
COSTS = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class FakeArm:
    """`effect` is added to the loss; `speed` is how much less a step costs; `growths` are (share, depth)."""

    effect: float = 0.0
    speed: float = 1.0
    growths: tuple[tuple[float, int], ...] = ()
    lengths: tuple[float, ...] = (1.0,)
    about: str = "twelve layers from the first step"


@dataclass(frozen=True)
class FakeStudy:
    """What to make up. `failed` and `missing` are (condition, length, seed)."""

    arms: Mapping[str, FakeArm]
    baseline: str | None = "static"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 400
    failed: Mapping[tuple[str, float, int], str] = field(default_factory=dict)
    missing: frozenset[tuple[str, float, int]] = frozenset()
    factors: Sequence[str] = ()
    tuned: bool = True
    metric: str = "eval_loss"
    name: str = "growth_vs_static"
    question: str = "Does a model that grows reach the static model's loss for less?"
    command: str = "aiether study run growth_vs_static --preset cpu"


GROWN = FakeArm(-0.05, 0.72, ((0.2, 6), (0.5, 12)), about="three layers, grown to six and twelve by stacking")
STATIC = FakeArm(lengths=(0.5, 0.7, 1.0, 1.4))
USUAL = FakeStudy({"static": STATIC, "growth": GROWN, "random-time": FakeArm(0.02, 0.8, ((0.33, 12),))})


def write_fake_study(folder: Path, fake: FakeStudy) -> Path:
    """A study's folder as `aiether study run` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = [
        _arm(folder, fake, name, arm, length) for name, arm in fake.arms.items() for length in arm.lengths
    ]
    (folder / "results.json").write_text(json.dumps(results_of(fake, arms), indent=1), encoding="utf-8")
    return folder


def results_of(fake: FakeStudy, arms: Sequence[Row]) -> Row:
    others = [name for name in fake.arms if name != fake.baseline] if fake.baseline in fake.arms else []
    pairs = [{"arm": name, "against": fake.baseline} for name in others]
    return {
        "study": {
            "name": fake.name,
            "question": fake.question,
            "preset": "cpu",
            "baseline": fake.baseline,
            "metric": fake.metric,
            "test": "t",
            "alpha": 0.05,
            "budget": {"unit": "tokens", "amount": 2048 * fake.steps},
            "seeds": list(fake.seeds),
            "lengths": sorted({length for arm in fake.arms.values() for length in arm.lengths}),
            "eval_windows": 256,
            "declared": pairs,
            "factors": {name: ["off", "on"] for name in fake.factors},
            "command": fake.command,
            "hash": "a1b2c3d4e5f6",
        },
        "environment": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"aiether": "0.5.0", "torch": "2.13.0", "python": "3.11.2"},
            "machine": {"processor": "a processor", "threads": 2},
        },
        "arms": list(arms),
        "tuning": [_tuning(name, place) for place, name in enumerate(fake.arms)] if fake.tuned else [],
        "comparisons": [_comparison(arms, pair["arm"], pair["against"]) for pair in pairs],
        "factorial": [_effect(name) for name in _effects(fake.factors)] or None,
        "equal_cost": [
            _at_cost(arms, name, fake.baseline, cost, "differences") for name in others for cost in COSTS
        ],
        "savings": [
            _at_cost(arms, name, fake.baseline, cost, "savings") for name in others for cost in COSTS
        ],
        "failures": [
            {
                "condition": name,
                "length": length,
                "seed": seed,
                "lr": 0.002,
                "tuning": False,
                "reason": reason,
            }
            for (name, length, seed), reason in fake.failed.items()
        ],
    }


# --- cells ------------------------------------------------------------------------------------------------


def _arm(folder: Path, fake: FakeStudy, name: str, arm: FakeArm, length: float) -> Row:
    cells = [_cell(folder, fake, name, arm, length, seed) for seed in fake.seeds]
    known = [cell["metric"] for cell in cells if cell["metric"] is not None]
    start = 3 if arm.growths else 12
    return {
        "condition": name,
        "length": length,
        "about": arm.about,
        "settings": {"n_layer": start, "growth_fractions": [share for share, _ in arm.growths]},
        "lr": 0.002,
        "parameters": {"start": 800_000 + 200_000 * start, "end": 3_200_000},
        "flops_per_token": {"start": 4.8e6 + 1.2e6 * start, "end": 1.92e7},
        "cells": cells,
        "summary": _summary(known) if known else None,
    }


def _cell(folder: Path, fake: FakeStudy, name: str, arm: FakeArm, length: float, seed: int) -> Row:
    place = f"cells/{list(fake.arms).index(name)}-{length:g}-seed{seed}"
    row: Row = {
        "seed": seed,
        "status": "missing",
        "reason": None,
        "folder": place,
        "growths": [],
        "timings": None,
    }
    row |= dict.fromkeys(("metric", "eval_loss", "bits_per_byte", "steps", "tokens", "flops", "depth"))
    if (name, length, seed) in fake.missing:
        return row
    if (name, length, seed) in fake.failed:
        return row | {"status": "failed", "reason": fake.failed[name, length, seed]}
    rows = _metric_rows(fake, arm, length, seed, list(fake.arms).index(name))
    (folder / place).mkdir(parents=True)
    write_lines(folder / place / "metrics.jsonl", rows)
    last = rows[-1]
    copied = {key: last[key] for key in ("eval_loss", "bits_per_byte", "tokens", "flops", "depth")}
    return row | copied | {
        "status": "finished",
        "metric": last[fake.metric],
        "steps": last["step"],
        "growths": _growths(arm, rows[-1]["step"], seed),
        "timings": {"seconds": last["elapsed_s"], "tokens_per_s": 40_000.0, "processor": "a processor"},
    }  # fmt: skip


def _growths(arm: FakeArm, steps: int, seed: int) -> list[Row]:
    found, depth = [], 3
    for share, after in arm.growths:
        step = int(share * steps) + seed
        found.append({"step": step, "depth_before": depth, "depth_after": after,
                      "loss_before": 4.2 - share, "loss_after": 4.6 - share})  # fmt: skip
        depth = after
    return found


def _metric_rows(fake: FakeStudy, arm: FakeArm, length: float, seed: int, place: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    luck = rng.normal(0, 0.03)
    noise = np.random.default_rng([seed, place, int(100 * length)])
    steps = int(fake.steps * length)
    grown = [(int(share * steps) + seed, depth) for share, depth in arm.growths]
    rows: list[Row] = []
    elapsed = flops = 0.0
    for step in range(4, steps + 1, 4):
        depth = [3 if arm.growths else 12, *(after for at, after in grown if at < step)][-1]
        elapsed += 4 * (0.02 + 0.008 * depth) * (1 + 0.01 * seed) * arm.speed
        flops += 4 * 6.0 * 2048 * (530_000 + 200_000 * depth) * arm.speed
        shock = sum(0.5 * math.exp(-(step - at) / 15) for at, _ in grown if at < step)
        decay = 0.25 * max(0.0, (step / steps - 0.8) / 0.2)
        loss = (
            3.6 + 6 * math.exp(-step / 25) + 1.1 * (1 + step / 60) ** -0.8 + luck + arm.effect + shock - decay
        )
        common = {"step": step, "depth": depth, "flops": flops, "tokens": 2048 * step, "elapsed_s": elapsed}
        rows.append(common | {
            "kind": "train",
            "loss": loss + noise.normal(0, 0.09),
            "grad_norm": 0.6 + shock + noise.gamma(2, 0.08),
            "tokens_per_s": 2048 / (0.02 + 0.008 * depth) / arm.speed * noise.normal(1, 0.03),
        })  # fmt: skip
        if step % 20 == 0 or step == steps // 4 * 4:
            evaluated = loss + 0.06 + noise.normal(0, 0.006)
            rows.append(common | {"kind": "eval", "eval_loss": evaluated, "bits_per_byte": evaluated / 2.3})
    return rows


# --- numbers, good enough to be shown -----------------------------------------------------------------------


def _interval(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    half = 2.776 * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values) + half]


def _summary(values: Sequence[float]) -> Row:
    ends = _interval(values)
    spread = {"sd": stdev(values)} if len(values) > 1 else {"sd": None}
    middle = sorted(values)[len(values) // 2]
    return {"n": len(values), "mean": fmean(values), **spread, "ci95": ends, "median": middle,
            "iqm": fmean(values), "iqm_ci95": ends}  # fmt: skip


def _losses(arms: Sequence[Row], name: str | None) -> dict[int, Row]:
    rows = [arm["cells"] for arm in arms if arm["condition"] == name and arm["length"] == 1.0]
    return {cell["seed"]: cell for cell in (rows[0] if rows else []) if cell["metric"] is not None}


def _tests(differences: Sequence[float]) -> Row:
    n, ends = len(differences), _interval(differences)
    mean = fmean(differences) if differences else None
    words = "no seed of both has finished"
    if mean is not None and ends:
        side = "lower" if mean < 0 else "higher"
        words = f"{side} by {abs(mean):.3f} ± {mean - ends[0]:.3f} over {n} seeds; p = 0.002 after Holm"
    shown = {"t_p": 0.0004, "sign_flip_p": 0.0625, "t_p_holm": 0.002, "sign_flip_p_holm": 0.125, "dz": -2.13}
    shown |= {"smallest_p": 0.0625, "detectable": 0.021}
    numbers = shown if ends else dict.fromkeys(shown)
    listed = {"n": n, "differences": list(differences), "mean": mean, "ci95": ends}
    return listed | numbers | {"verdict": words}


def _comparison(arms: Sequence[Row], arm: str, against: str | None) -> Row:
    mine, theirs = _losses(arms, arm), _losses(arms, against)
    seeds = sorted(mine.keys() & theirs.keys())
    differences = [mine[seed]["metric"] - theirs[seed]["metric"] for seed in seeds]
    return {"arm": arm, "against": against, "planned": True, "seeds": seeds, **_tests(differences)}


def _effects(factors: Sequence[str]) -> list[str]:
    pairs = [f"{a} x {b}" for i, a in enumerate(factors) for b in factors[i + 1 :]]
    return [*factors, *pairs]


def _effect(name: str) -> Row:
    rng = np.random.default_rng(len(name))
    differences = list(rng.normal(-0.02, 0.015, size=5))
    return {"effect": name, "seeds": list(range(5)), **_tests(differences)}


def _at_cost(arms: Sequence[Row], name: str, against: str | None, cost: str, key: str) -> Row:
    """Shares that differ by seed; the last seed lies outside the baseline's lengths."""
    seeds = sorted(_losses(arms, name))
    start = {"tokens": 0.12, "flops": 0.31, "seconds": 0.24}[cost] * (1 if name == "growth" else -0.4)
    values: list[float | None] = [start + 0.03 * math.sin(seed) for seed in seeds]
    if key == "differences":
        values = [-0.2 * value for value in values if value is not None]
    elif len(values) > 3:
        values[-1] = None
    known = [value for value in values if value is not None]
    mean = fmean(known) if known else None
    words = "no figure: the loss lies outside the baseline's lengths"
    if mean is not None:
        less, lower = "less" if mean > 0 else "more", "lower" if mean < 0 else "higher"
        saved = f"{abs(mean):.0%} {less} {cost} for the same loss"
        words = saved if key == "savings" else f"{lower} by {abs(mean):.3f} at equal {cost}"
    return {"arm": name, "against": against, "cost": cost, "n": len(known), "seeds": seeds, key: values,
            "mean": mean, "ci95": _interval(known), "verdict": words, "beyond": 1}  # fmt: skip


def _tuning(name: str, place: int) -> Row:
    tried = [{"lr": lr, "metric": 3.9 + abs(math.log2(lr / 0.002)) / 20, "folder": f"cells/{place}-lr{lr:g}"}
             for lr in (0.001, 0.002, 0.004)]  # fmt: skip
    return {"condition": name, "tried": tried, "chosen": 0.002, "at_edge": place == 1}


MANY = FakeStudy(
    {
        "static": STATIC,
        "linear+curvature+escape-with-everything-else-that-a-name-can-hold": GROWN,
        **{
            f"arm-{index}": FakeArm(0.012 * index - 0.05, 1 - index / 20, GROWN.growths[: index % 3])
            for index in range(8)
        },
    },
    seeds=(0, 1, 2),
    failed={("arm-3", 1.0, 1): "RuntimeError: the loss is not finite at step 212\n  in train()\n  in step()"},
    missing=frozenset({("arm-5", 1.0, 2), ("arm-6", 1.0, 0)}),
    factors=("mod", "latent", "memory"),
)
"""Ten conditions, as many as there are colours, of which some runs have failed or are missing."""
