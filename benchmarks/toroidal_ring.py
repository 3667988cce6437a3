"""Attention over a sequence that is sharded over ranks, against the whole sequence on one device.

    torchrun --nproc_per_node 2 benchmarks/toroidal_ring.py --backend nccl          # GPUs, about 2 minutes
    torchrun --nproc_per_node 2 benchmarks/toroidal_ring.py --backend gloo --length 512 --exact_length 256 \\
        --heads 4 --groups 2 --size 32 --rounds 2                                   # CPU

Plain and toroidal (D = 2) attention, causal. `difference`: the largest difference of the output and of each
gradient, float32, relative to the tensor's largest entry. `speed`: forward and backward in bfloat16; seconds
are the median over rounds, of the slowest rank; peak memory (CUDA alone) is the largest of a rank, with the
inputs of its share. `one_device` is rank 0 alone with the whole sequence, null where it has no memory for it.

Writes benchmarks/results/toroidal_ring.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from _machine import about
from aiether.toroidal import (
    Places,
    SequenceShards,
    ToroidalSettings,
    TorusTerms,
    ring_attention,
    toroidal_attention,
    toroidal_ring_attention,
)

KINDS = ("plain", "toroidal")
Sizes = tuple[int, int, int, int]
"""Tokens, heads, key heads, dimensions of a head."""


def settings_of(exact: bool) -> ToroidalSettings:
    """Where it is about exactness nothing is compiled, for a length alone."""
    return ToroidalSettings(platters=2, period=2048, backend="eager" if exact else "auto")


class Work:
    """One kind of attention over one sequence: this rank's share of it, or all of it."""

    def __init__(
        self, kind: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, shards: SequenceShards | None
    ) -> None:
        length, heads, groups, size = sizes
        self.shards, self.scale, self.exact = shards, size**-0.5, dtype == torch.float32
        generator = torch.Generator().manual_seed(0)
        whole = (torch.randn(1, h, length, size, generator=generator) for h in (heads, groups, groups, heads))
        given = [(each if shards is None else shards.take(each, 2)).to(device, dtype) for each in whole]
        self.query, self.key, self.value = (each.requires_grad_() for each in given[:3])
        self.weight = given[3]
        order = torch.arange(length, device=device)
        self.places = Places(order, order, known_by=(length, length))
        self.terms: TorusTerms | None = None
        if kind == "toroidal":
            torch.manual_seed(0)
            self.terms = TorusTerms(heads, size, settings_of(self.exact)).to(device)
            self.terms.set_progress(1.0)
            for parameter in self.terms.parameters():
                torch.nn.init.normal_(parameter)

    def attend(self) -> Tensor:
        """(1, H, N, X) of this rank's tokens."""
        given, terms = (self.query, self.key, self.value), self.terms
        if terms is None and self.shards is None:
            return F.scaled_dot_product_attention(*given, is_causal=True, scale=self.scale, enable_gqa=True)
        if terms is None:
            assert self.shards is not None
            return ring_attention(*given, self.shards, scale=self.scale)
        if self.shards is None:
            output = toroidal_attention(
                *given, terms(self.query), terms.settings, self.places, scale=self.scale
            )
        else:
            output = toroidal_ring_attention(
                *given, terms(self.query), terms.settings, self.shards, scale=self.scale
            )
        return terms.fuse(output).flatten(3)

    def step(self) -> dict[str, Tensor]:
        """The output and the gradients of queries, keys, values, lambda, cross scores and fusion."""
        output = self.attend()
        learned = {} if self.terms is None else dict(self.terms.named_parameters())
        inputs = {"query": self.query, "key": self.key, "value": self.value, **learned}
        grads = torch.autograd.grad((output * self.weight).sum(), list(inputs.values()))
        return {"output": output.detach(), **dict(zip(inputs, grads, strict=True))}


def differences(kind: str, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Of the ranks together from one device, each tensor's largest relative to its largest entry."""
    shards = SequenceShards(sizes[0])
    found = Work(kind, sizes, torch.float32, device, shards).step()
    expected = Work(kind, sizes, torch.float32, device, None).step()
    told = {}
    for name, right in expected.items():
        if name in ("output", "query", "key", "value"):
            own = shards.gather(found[name], 2)
        else:
            own = shards.total(found[name])
        told[name] = float((own - right).abs().max() / right.abs().max())
    return told


def measure(step: Callable[[], Any], device: torch.device, rounds: int, together: bool) -> dict[str, float]:
    """Seconds of a step and peak memory; of the slowest rank and the fullest where they work together."""
    cuda = device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)
        if together:
            dist.barrier()

    for _ in range(3):
        step()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(_largest(time.perf_counter() - began, device, together))
    found = {"seconds": median(seconds)}
    if cuda:
        found["peak_bytes"] = _largest(torch.cuda.max_memory_allocated(device), device, together)
    return found


def _largest(value: float, device: torch.device, together: bool) -> float:
    if not together:
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def speed(kind: str, sizes: Sizes, device: torch.device, rounds: int) -> dict[str, Any]:
    """The ranks together, then rank 0 alone while the others wait."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    work = Work(kind, sizes, torch.bfloat16, device, SequenceShards(sizes[0]))
    told: dict[str, Any] = {"ranks": measure(work.step, device, rounds, together=True), "one_device": None}
    del work
    if dist.get_rank() == 0:
        try:
            alone = Work(kind, sizes, torch.bfloat16, device, None)
            told["one_device"] = measure(alone.step, device, rounds, together=False)
        except torch.OutOfMemoryError:
            print(f"{kind}: one device has no memory for {sizes[0]} tokens", flush=True)
    dist.barrier()
    for each in (told["ranks"], told["one_device"]):
        if each is not None and "peak_bytes" in each:
            each["peak_bytes"] -= before
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="nccl")
    parser.add_argument("--length", type=int, nargs="+", default=[32768], help="of the timed sequences")
    parser.add_argument("--exact_length", type=int, default=4096, help="of the sequences that are compared")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "toroidal_ring.json")
    given = parser.parse_args()
    device = torch.device("cpu")
    if given.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # flash for both
    dist.init_process_group(given.backend, device_id=device if given.backend == "nccl" else None)
    first = dist.get_rank() == 0
    content = about(seeds=[0], commit=given.commit) | {
        "backend": given.backend,
        "ranks": dist.get_world_size(),
        "gpu": torch.cuda.get_device_name() if given.backend == "nccl" else None,
        "heads": given.heads,
        "groups": given.groups,
        "size": given.size,
        "exact_length": given.exact_length,
        "difference": {},
        "speed": {},
    }
    for kind in KINDS:
        exact = (given.exact_length, 4, 2, given.size)
        content["difference"][kind] = told = differences(kind, exact, device)
        if first:
            print(f"{kind}: largest difference {max(told.values()):.1e}", flush=True)
    for length in given.length:
        rows = content["speed"][str(length)] = {}
        for kind in KINDS:
            rows[kind] = speed(kind, (length, given.heads, given.groups, given.size), device, given.rounds)
            if first:
                given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                print(f"N={length} {kind}: {rows[kind]}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
