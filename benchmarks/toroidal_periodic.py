"""Whether a torus helps where data are periodic: its period matched, mismatched, and none.

    python benchmarks/toroidal_periodic.py        # two cores, about 10 minutes

A small Phi learns to continue sequences that repeat after P tokens, with noise, for many P. Copies of it are
then tuned on sequences of one held-out P: with adapters alone, and on a torus whose period is that P, another
one, or that P with places in random order. Shown: loss on what can be known of new sequences of that P, and
of another held-out one, seed by seed. Writes benchmarks/results/toroidal_periodic.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

import aiether
from _machine import about
from aiether.evaluation.tasks import losses_by_period, periodic_windows, split_periods
from aiether.retrofitting import TuneConfig, tune
from aiether.training.model import build_model

RESULT = Path(__file__).parent / "results" / "toroidal_periodic.json"
VOCAB, LENGTH, NOISE = 64, 128, 0.2
LOW, HIGH = 5, 40
LAYERS, WIDTH, HEADS, BATCH = 2, 64, 4, 16


def batch(periods: list[int], number: int, seed: int) -> Tensor:
    """Sequences of periods drawn for this batch, int64 (B, T)."""
    drawn = Random(f"{seed} {number}")
    made = []
    for row in range(BATCH):
        chosen = drawn.choice(periods)
        where = drawn.getrandbits(30)
        window = periodic_windows(
            chosen, length=LENGTH, vocab_size=VOCAB, number=1, noise=NOISE, seed=where + row
        )
        made.append(window[0][0])
    return torch.stack(made)


def pretrained(periods: list[int], steps: int, seed: int) -> Any:
    """The model before its conversion."""
    model: Any = build_model(
        "phi",
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        context_length=LENGTH,
        vocab_size=VOCAB,
        dropout=0.0,
        eos_token_id=None,
        final_depth=LAYERS,
        seed=seed,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        ids = batch(periods, step, seed)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            print(f"  pretraining step {step} loss {loss.item():.3f}", flush=True)
    return model.eval()


def arms_for(matched: int, other: int) -> dict[str, dict[str, Any]]:
    """The torus of each arm; none: the adapters alone."""
    torus = {"platters": 2, "lambda_distance": 16.0, "lambda_range": 4.0, "sinks": 0, "gate": 0.5}
    return {
        "adapters": {"platters": 1, "lambda_distance": 0.0, "token_lambda": False},
        "matched": {**torus, "period": matched},
        "mismatched": {**torus, "period": other},
        "shuffled": {**torus, "period": matched, "shuffled": True},
        "matched, D=1": {**torus, "platters": 1, "period": matched},
    }


def known_loss(model: Any, period: int, seed: int) -> float:
    """Mean loss on what can be known of new sequences."""
    settings = {"length": LENGTH, "vocab_size": VOCAB, "number": 64, "noise": NOISE, "seed": 10**6 + seed}
    return losses_by_period(model, [period], **settings)[period].loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    content: dict[str, Any] = about(seeds=given.seeds) | {
        "pretraining": given.pretraining,
        "steps": given.steps,
    }
    content["runs"] = []
    for seed in given.seeds:
        trained, held_out = split_periods(LOW, HIGH, 4, seed=seed)
        matched, other = held_out[1], held_out[2]
        base = pretrained(trained, given.pretraining, seed)
        row: dict[str, Any] = {"seed": seed, "period": matched, "other": other}
        row["untuned"] = {"matched": known_loss(base, matched, seed), "other": known_loss(base, other, seed)}
        for name, options in arms_for(matched, other).items():
            model = aiether.retrofit(copy.deepcopy(base), layers=list(range(LAYERS)), **options)
            tuning = TuneConfig(
                transfer_steps=0,
                steps=given.steps,
                batch_size=BATCH,
                accumulation=1,
                lr=2e-3,
                kl_weight=0.0,
                seed=seed,
            )
            tune(model, lambda number, at=matched, seed=seed: batch([at], number, 7919 + seed), tuning)
            row[name] = {"matched": known_loss(model, matched, seed), "other": known_loss(model, other, seed)}
            print(f"seed {seed} period {matched} {name}: {row[name]}", flush=True)
        content["runs"].append(row)
        given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in ("untuned", *arms_for(8, 9)):
        losses = [row[name]["matched"] for row in content["runs"]]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{name}: {fmean(losses):.4f}{spread}")


if __name__ == "__main__":
    main()
