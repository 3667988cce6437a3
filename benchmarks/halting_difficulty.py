"""Whether thinking follows difficulty: pointer chasing with a latent block of up to 4 iterations.

    python benchmarks/halting_difficulty.py

A row holds a random function as a table of pairs, then queries (hops, node), each followed by its answer. A
hop is one look-up in the table, so that more hops want more iterations; none is needed for 0 hops. Trained on
equal data: a model that always takes all iterations, whose frozen copy then gets a halting head in a second
stage; and models whose halting is learned by sampled exits, with a uniform and with a geometric prior. Shown:
mean iterations and accuracy by hops, and the loss against that of all iterations. Writes
benchmarks/results/halting_difficulty.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _machine import about
from aiether.adaptive import LahrConfig, LahrForCausalLM, LatentSettings, set_halt_q
from aiether.adaptive.second_stage import exit_losses, renew_halting_head, train_halting_head

RESULT = Path(__file__).parent / "results" / "halting_difficulty.json"
NODES, HOPS, QUERIES = 5, 5, 10
"""Nodes of a function; hops from 0 to HOPS - 1; queries of a row."""
VOCAB = NODES + NODES * NODES + HOPS * NODES
ITERATIONS = 4
THRESHOLDS = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)


def rows(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Rows of a table and its queries; only answers have labels. `hops`: of each query, -1 elsewhere."""
    function = torch.randint(NODES, (count, NODES), generator=generator)
    order = torch.rand(count, NODES, generator=generator).argsort(-1)
    table = NODES + order * NODES + function.gather(-1, order)
    hops = torch.randint(HOPS, (count, QUERIES), generator=generator)
    start = torch.randint(NODES, (count, QUERIES), generator=generator)
    answer = start
    for hop in range(1, HOPS):
        answer = torch.where(hops >= hop, function.gather(-1, answer), answer)
    queries = NODES + NODES * NODES + hops * NODES + start
    input_ids = torch.cat([table, torch.stack([queries, answer], -1).flatten(1)], dim=-1)
    labels = torch.full_like(input_ids, -100)
    labels[:, NODES + 1 :: 2] = answer
    asked = torch.full_like(input_ids, -1)
    asked[:, NODES::2] = hops
    return {"input_ids": input_ids, "labels": labels, "hops": asked}


def build(seed: int, **latent: Any) -> LahrForCausalLM:
    """One layer and a latent block, of width 64."""
    torch.manual_seed(seed)
    config = LahrConfig(
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        latent=vars(LatentSettings(iterations=ITERATIONS, **latent)),
        pad_token_id=None,
    )
    return LahrForCausalLM(config)


def train(model: LahrForCausalLM, steps: int, batch: int, seed: int) -> float:
    """AdamW with warm-up and linear decay; returns seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    begin = time.perf_counter()
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, (steps - step) / (0.7 * steps), 1.0)
        data = rows(batch, generator)
        loss = model(input_ids=data["input_ids"], labels=data["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"  step {step} loss {loss.item():.3f}", flush=True)
    return time.perf_counter() - begin


@torch.no_grad()
def measure(model: LahrForCausalLM, seed: int = 12345, count: int = 256) -> dict[str, Any]:
    """Loss in nats and mean iterations over the answers, and both with accuracy by hops."""
    model.eval()
    data = rows(count, torch.Generator().manual_seed(seed))
    output = model.model(input_ids=data["input_ids"], use_cache=False)
    logits = model.lm_head(output.last_hidden_state)[:, :-1]
    target, hops = data["input_ids"][:, 1:], data["hops"][:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, target, reduction="none")
    right, taken = logits.argmax(-1) == target, output.iterations[:, :-1].float()
    asked = hops >= 0
    by_hops = [
        {
            "hops": hop,
            "loss": losses[hops == hop].mean().item(),
            "accuracy": right[hops == hop].float().mean().item(),
            "iterations": taken[hops == hop].mean().item(),
        }
        for hop in range(HOPS)
    ]
    return {"loss": losses[asked].mean().item(), "iterations": taken[asked].mean().item(), "by_hops": by_hops}


def all_exits(model: LahrForCausalLM, seed: int = 12345, count: int = 256) -> list[list[float]]:
    """Mean loss by hops (inner) after each iteration (outer), if every token takes them all."""
    data = rows(count, torch.Generator().manual_seed(seed))
    losses = exit_losses(model, data).losses_NBT
    return [[each[data["hops"] == hop].mean().item() for hop in range(HOPS)] for each in losses]


def _show(name: str, figures: dict[str, Any]) -> None:
    by = figures["by_hops"]
    print(
        f"{name:24s} loss {figures['loss']:.4f} iterations {figures['iterations']:.2f} | by hops: "
        + " ".join(f"{row['iterations']:.2f}/{row['accuracy']:.2f}" for row in by),
        flush=True,
    )


def at_thresholds(name: str, model: LahrForCausalLM) -> dict[str, Any]:
    """What is measured at each halting threshold."""
    found = {}
    for q in THRESHOLDS:
        set_halt_q(model, q)
        found[f"q={q}"] = measure(model)
        _show(f"{name} q={q}", found[f"q={q}"])
    return found


def second_stage(fixed: LahrForCausalLM, seed: int, batches: int, batch: int, tau: float) -> dict[str, Any]:
    """A halting head on a frozen copy of a model that was trained with a fixed number of iterations."""
    model = copy.deepcopy(fixed)
    renew_halting_head(model)
    generator = torch.Generator().manual_seed(seed + 999)
    begin = time.perf_counter()
    losses = train_halting_head(model, [rows(batch, generator) for _ in range(batches)], tau=tau, lr=0.05)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "head_loss": [losses[0], sum(losses[-20:]) / 20],
        **at_thresholds("second stage", model),
    }


def run(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All models of one seed."""
    fixed = build(seed, halting="fixed")
    seconds = train(fixed, arguments.steps, arguments.batch, seed)
    result: dict[str, Any] = {"seed": seed, "fixed": {"seconds": seconds, **measure(fixed)}}
    result["fixed"]["loss_by_exit_and_hops"] = all_exits(fixed)
    _show("fixed", result["fixed"])
    result["second_stage"] = second_stage(fixed, seed, arguments.head_batches, arguments.batch, arguments.tau)
    for prior in ("uniform", "geometric"):
        model = build(seed, prior=prior, prior_rate=0.5, kl_weight=arguments.kl_weight)
        seconds = train(model, arguments.steps, arguments.batch, seed)
        result[f"sampled_exits_{prior}"] = {
            "seconds": seconds,
            "loss_by_exit_and_hops": all_exits(model),
            **at_thresholds(f"sampled, {prior}", model),
        }
    return result


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kl_weight", type=float, default=0.01)
    parser.add_argument("--head_batches", type=int, default=300)
    parser.add_argument("--tau", type=float, default=0.005)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = about(seeds=arguments.seeds)
    names = ("steps", "batch", "kl_weight", "head_batches", "tau")
    result |= {name: getattr(arguments, name) for name in names}
    result["runs"] = []
    for seed in arguments.seeds:
        result["runs"].append(run(seed, arguments))
        result["seeds"] = [each["seed"] for each in result["runs"]]  # those that have been run by now
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
