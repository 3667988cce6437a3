"""Whether thinking follows difficulty: pointer chasing with a latent block of up to 4 iterations.

    python benchmarks/halting_difficulty.py

A row holds a random function as a table of pairs, then queries (hops, node), each followed by its answer. A
hop is one look-up in the table, so that more hops want more iterations; none is needed for 0 hops. Trained:
halting learned by sampled exits, and the same model with a fixed number of iterations. Then a second stage
teaches the halting head of the first model alone. Shown: mean iterations and accuracy by hops, and the loss
against that of all iterations. Writes benchmarks/results/halting_difficulty.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _machine import about
from aiether.adaptive import LahrConfig, LahrForCausalLM, LatentSettings, set_halt_q
from aiether.adaptive.second_stage import exit_losses, train_halting_head

RESULT = Path(__file__).parent / "results" / "halting_difficulty.json"
NODES, HOPS, QUERIES = 5, 5, 10
"""Nodes of a function; hops from 0 to HOPS - 1; queries of a row."""
VOCAB = NODES + NODES * NODES + HOPS * NODES
ITERATIONS = 4


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


def build(halting: str, seed: int, kl_weight: float) -> LahrForCausalLM:
    """One layer and a latent block, of width 64."""
    torch.manual_seed(seed)
    latent = LatentSettings(iterations=ITERATIONS, halting=halting, kl_weight=kl_weight)  # type: ignore[arg-type]
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
        latent=vars(latent),
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


def run(seed: int, steps: int, batch: int, kl_weight: float) -> dict[str, Any]:
    """Both models of one seed, and the second stage."""
    result: dict[str, Any] = {"seed": seed}
    fixed = build("fixed", seed, kl_weight)
    result["fixed"] = {"seconds": train(fixed, steps, batch, seed), **measure(fixed)}
    _show("fixed", result["fixed"])
    learned = build("learned", seed, kl_weight)
    seconds = train(learned, steps, batch, seed)
    result["exits"] = all_exits(learned)
    sampled: dict[str, Any] = {"seconds": seconds}
    for q in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        set_halt_q(learned, q)
        sampled[f"q={q}"] = measure(learned)
        _show(f"sampled exits q={q}", sampled[f"q={q}"])
    result["sampled_exits"] = sampled
    generator = torch.Generator().manual_seed(seed + 999)
    begin = time.perf_counter()
    train_halting_head(learned, [rows(batch, generator) for _ in range(100)], tau=0.02)
    stage: dict[str, Any] = {"seconds": time.perf_counter() - begin}
    for q in (0.25, 0.5, 0.75):
        set_halt_q(learned, q)
        stage[f"q={q}"] = measure(learned)
        _show(f"second stage q={q}", stage[f"q={q}"])
    result["second_stage"] = stage
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kl_weight", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = about(seeds=arguments.seeds)
    result |= {"steps": arguments.steps, "batch": arguments.batch, "kl_weight": arguments.kl_weight}
    result["runs"] = [
        run(seed, arguments.steps, arguments.batch, arguments.kl_weight) for seed in arguments.seeds
    ]
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
