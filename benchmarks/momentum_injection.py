"""With moments copied to new layers, is a warm-up still needed? A small model on a CPU, grown in place.

    python benchmarks/momentum_injection.py [--seeds 3] [--out benchmarks/results/momentum_injection.json]

A Llama of 2 layers learns the bytes of Python's standard library at a constant learning rate, is copied, and
each copy grows to 4 layers (stack, init copy) under one pair of moments and learning-rate policy. Arms of a
seed share the weights before the growth, the batches after it and the validation text: they are compared in
pairs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import aiether
from _machine import about
from aiether.growth import LrPolicy, Moments, family_of
from aiether.training.optimizer import OptimizerName, build_optimizer

WIDTH, CONTEXT, BATCH = 64, 64, 8
STEPS_BEFORE, STEPS_AFTER, WARMUP, REWARM = 300, 200, 30, 50
MARKS = (0, 1, 5, 10, 25, 50, 100, 200)
"""Steps after the growth at which the validation loss is taken."""
LEARNING_RATE: dict[OptimizerName, float] = {"adamw": 3e-3, "muon": 3e-3}
POLICIES: tuple[LrPolicy, ...] = ("unchanged", "rewarm_new", "rewarm_all")
ARMS: tuple[tuple[Moments, LrPolicy], ...] = (
    *(("zero", policy) for policy in POLICIES),
    *(("copy", policy) for policy in POLICIES),
    ("reset", "unchanged"),
)


def text(max_bytes: int = 6_000_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes for training and, from other files, for validation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(files):
        parts[number % 10 == 9].append(path.read_bytes())
    train, valid = (torch.frombuffer(bytearray(b"".join(p)[:max_bytes]), dtype=torch.uint8) for p in parts)
    return train, valid


def batches(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()]).long()


@torch.no_grad()
def evaluate(model: nn.Module, valid: torch.Tensor) -> float:
    """Mean loss in nats a byte over 8 fixed batches."""
    losses = [model(input_ids=b, labels=b).loss.item() for b in itertools.islice(batches(valid, 0), 8)]
    return statistics.mean(losses)


def step(model: nn.Module, optimizer: Optimizer, batch: torch.Tensor) -> float:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def small_model(name: OptimizerName, train: torch.Tensor, seed: int) -> tuple[LlamaForCausalLM, Optimizer]:
    """Trained for STEPS_BEFORE steps, a linear warm-up first."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = make_optimizer(model, name)
    for number, batch in enumerate(itertools.islice(batches(train, seed), STEPS_BEFORE)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE[name] * min(1.0, (number + 1) / WARMUP)
        step(model, optimizer, batch)
    return model, optimizer


def make_optimizer(model: LlamaForCausalLM, name: OptimizerName) -> Optimizer:
    return build_optimizer(
        model, family_of(model).blocks, name=name, lr=LEARNING_RATE[name], weight_decay=0.1, betas=(0.9, 0.95)
    )


def run_arm(
    start: tuple[LlamaForCausalLM, Optimizer],
    name: OptimizerName,
    moments: Moments,
    policy: LrPolicy,
    data: tuple[torch.Tensor, torch.Tensor],
    seed: int,
) -> dict[str, Any]:
    train, valid = data
    model = copy.deepcopy(start[0])
    optimizer = make_optimizer(model, name)
    optimizer.load_state_dict(copy.deepcopy(start[1].state_dict()))
    before = evaluate(model, valid)
    plan = aiether.GrowthPlan.stack(model, to_layers=4, init="copy")
    aiether.grow(model, plan, optimizer=optimizer, moments=moments, lr_policy=policy, rewarm_steps=REWARM)
    curve = {0: evaluate(model, valid)}
    losses = []
    for number, batch in enumerate(itertools.islice(batches(train, 1000 + seed), STEPS_AFTER), 1):
        losses.append(step(model, optimizer, batch))
        if number in MARKS:
            curve[number] = evaluate(model, valid)
    return {
        "optimizer": name,
        "moments": moments,
        "lr_policy": policy,
        "seed": seed,
        "valid_before": before,
        "valid": curve,
        "worst_train_loss": max(losses),
    }


def summarise(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and final losses less those of zero moments at an unchanged rate, seed by seed."""
    rows = []
    for name, (moments, policy) in itertools.product(LEARNING_RATE, ARMS):
        own, base = _arms(arms, name, moments, policy), _arms(arms, name, "zero", "unchanged")
        if own:
            rows.append(
                {
                    "optimizer": name,
                    "moments": moments,
                    "lr_policy": policy,
                    "valid": {mark: statistics.mean(a["valid"][mark] for a in own) for mark in MARKS},
                    "worst_train_loss": max(a["worst_train_loss"] for a in own),
                    "final_minus_zero_unchanged": [
                        a["valid"][STEPS_AFTER] - b["valid"][STEPS_AFTER]
                        for a, b in zip(own, base, strict=True)
                    ],
                }
            )
    return rows


def _arms(arms: list[dict[str, Any]], name: str, moments: str, policy: str) -> list[dict[str, Any]]:
    return [a for a in arms if (a["optimizer"], a["moments"], a["lr_policy"]) == (name, moments, policy)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--optimizers", nargs="+", choices=sorted(LEARNING_RATE), default=sorted(LEARNING_RATE)
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "momentum_injection.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, data, arms = time.perf_counter(), text(), []
    for name, seed in itertools.product(arguments.optimizers, range(arguments.seeds)):
        start = small_model(name, data[0], seed)
        for moments, policy in ARMS:
            arms.append(run_arm(start, name, moments, policy, data, seed))
            print(json.dumps(arms[-1]), flush=True)
    result = {
        "settings": {
            "width": WIDTH,
            "context": CONTEXT,
            "batch": BATCH,
            "steps_before": STEPS_BEFORE,
            "steps_after": STEPS_AFTER,
            "rewarm_steps": REWARM,
            "learning_rate": LEARNING_RATE,
            "train_bytes": len(data[0]),
            "valid_bytes": len(data[1]),
        },
        "summary": summarise(arms),
        "arms": arms,
        "seconds": round(time.perf_counter() - started),
        **about(seeds=range(arguments.seeds)),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
