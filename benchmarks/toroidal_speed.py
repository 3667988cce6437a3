"""What toroidal attention costs beside plain attention: a whole layer of Phi-2's shape, forward and backward.

    python benchmarks/toroidal_speed.py --device cuda            # one GPU, about 2 minutes
    python benchmarks/toroidal_speed.py --device cpu --lengths 128 --width 160 --heads 2

A layer of transformers' Phi (width 2,560, 32 heads of 80), one window, forward and backward for its input and
its weights, in bfloat16 on CUDA; arms take turns, a figure is the median over rounds. Beside the time: peak
memory (CUDA alone), and the arithmetic of attention, as it is computed and as a kernel of its own would need
it, over that of plain attention. `bias_bytes`: of N D x N D in float32, which nothing makes.

Writes benchmarks/results/toroidal_speed_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PhiConfig, PhiForCausalLM

import aiether
from _machine import about
from aiether.toroidal import set_progress

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "D=1, chordal": {"platters": 1},
    "D=1, harmonics": {"platters": 1, "distance": "harmonics"},
    "D=1, triangle": {"platters": 1, "distance": "triangle"},
    "D=2, chordal": {"platters": 2},
    "D=4, chordal": {"platters": 4},
}


class Arm:
    """One layer, converted or not."""

    def __init__(self, options: dict[str, Any] | None, given: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = PhiConfig(
            vocab_size=64,
            hidden_size=given.width,
            intermediate_size=4 * given.width,
            num_hidden_layers=1,
            num_attention_heads=given.heads,
            max_position_embeddings=max(given.lengths),
            use_cache=False,
        )
        dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
        self.model: Any = PhiForCausalLM(config)
        self.model.to(given.device, dtype)
        if options is not None:
            aiether.retrofit(self.model, layers=[0], **options)
            set_progress(self.model, 1.0)
        self.device, self.dtype = given.device, dtype
        self.layer = self.model.model.layers[0]

    def step(self, length: int) -> None:
        """The layer forward and backward, for its weights and its input."""
        hidden = torch.randn(1, length, self.model.config.hidden_size, device=self.device, dtype=self.dtype)
        hidden.requires_grad_()
        places = torch.arange(length, device=self.device)[None]
        rotary = self.model.model.rotary_emb(hidden, position_ids=places)
        output = self.layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=places)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().mean().backward()
        self.model.zero_grad(set_to_none=True)


def arithmetic(options: dict[str, Any] | None, head_dim: int) -> dict[str, float]:
    """Attention's products over plain attention's: as computed, and as one kernel for it would need them."""
    if options is None:
        return {"computed": 1.0, "needed": 1.0}
    platters = options["platters"]
    waves = {"chordal": 3, "harmonics": 9, "triangle": 0}[options.get("distance", "chordal")]
    halves = 3 * waves  # in half precision, each in two parts
    computed = platters**2 * (head_dim + halves + head_dim) / (2 * head_dim)
    needed = platters**2 * (head_dim + waves + head_dim / platters) / (2 * head_dim)
    return {"computed": computed, "needed": needed}


def measure(arms: dict[str, Arm], length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step, in turns, and peak memory beyond the weights."""
    cuda = next(iter(arms.values())).device == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peak: dict[str, int] = {}
    for name, arm in arms.items():
        for _ in range(3):
            arm.step(length)
        if cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            arm.step(length)
            torch.cuda.synchronize()
            peak[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for name, arm in arms.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(5 if cuda else 1):
                arm.step(length)
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - began) / (5 if cuda else 1))
    plain = median(seconds["plain"])
    rows: dict[str, dict[str, float]] = {}
    for name in arms:
        rows[name] = {"seconds": median(seconds[name]), "ratio": median(seconds[name]) / plain}
        if cuda:
            rows[name] |= {"peak_bytes": peak[name], "peak_ratio": peak[name] / peak["plain"]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as while training; flash for all arms
    content = about(seeds=[0], commit=given.commit) | {"device": given.device, "lengths": {}}
    content |= {"width": given.width, "heads": given.heads}
    if given.device == "cuda":
        content["gpu"] = torch.cuda.get_device_name()
    head_dim = given.width // given.heads
    content["arithmetic"] = {name: arithmetic(ARMS[name], head_dim) for name in given.arms}
    arms = {name: Arm(ARMS[name], given) for name in given.arms}
    out = given.out or Path(__file__).parent / "results" / f"toroidal_speed_{given.device}.json"
    for length in given.lengths:
        rows = measure(arms, length, given.rounds)
        bias = {f"D={d}": 4 * (length * d) ** 2 for d in (1, 2, 4, 8)}
        content["lengths"][str(length)] = {"arms": rows, "bias_bytes": bias}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for name, row in rows.items():
            told = content["arithmetic"][name]
            memory = f", memory {row['peak_ratio']:.2f}" if "peak_ratio" in row else ""
            print(
                f"N={length} {name}: {1e3 * row['seconds']:.2f} ms, {row['ratio']:.2f}x (arithmetic of "
                f"attention {told['computed']:.2f}x, needed {told['needed']:.2f}x){memory}",
                flush=True,
            )


if __name__ == "__main__":
    main()
