"""Peak memory of tuning a converted Phi-2, beside what is estimated before the start.

    python benchmarks/toroidal_memory.py --device cuda                      # one GPU, about a minute
    python benchmarks/toroidal_memory.py --device cpu --width 64 --heads 2 --depth 4 --layers 0 2

A Phi of Phi-2's shape (32 layers of width 2,560, 2.8 billion parameters) with random weights in bfloat16,
four layers converted (D = 2), windows of 256 tokens, gradient checkpointing: two steps of transfer and
two of tuning, with LoRA and with the terms alone. The peak is that of tensors, the model's weights
included; a CPU counts none.

Writes benchmarks/results/toroidal_memory.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

import aiether
from _machine import about
from aiether.evaluation import watch_peak
from aiether.retrofitting import TuneConfig, estimate_memory, tune
from aiether.toroidal import ToroidalSettings

RESULT = Path(__file__).parent / "results" / "toroidal_memory.json"
VOCABULARY = 51200


def model_of(settings: argparse.Namespace) -> Any:
    """The model before its conversion, made where it is used."""
    config = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(settings.device):
            return PhiForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measured(settings: argparse.Namespace, tuned: Any) -> dict[str, Any]:
    """Estimate and peak of one way of tuning, bytes."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    peak = watch_peak(device)
    model = model_of(settings)
    torus = ToroidalSettings(platters=settings.platters)
    config = TuneConfig(
        transfer_steps=2,
        steps=2,
        ramp=0.0,
        accumulation=1,
        tune=tuned,
        gradient_checkpointing=True,
        bf16=True,
    )
    estimate = estimate_memory(model, settings.layers, torus, config, settings.context_length)
    aiether.retrofit(model, layers=settings.layers, settings=torus)

    def batch(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(VOCABULARY, (1, settings.context_length), generator=generator)

    found = tune(model, batch, config)
    return {
        "tune": tuned,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": found.trained,
        "losses": [row.get("loss", row.get("transfer")) for row in found.rows],
        "estimate": {**asdict(estimate), "total": estimate.total},
        "peak": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 8, 16, 24])
    parser.add_argument("--platters", type=int, default=2)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=RESULT)
    settings = parser.parse_args()
    content: dict[str, Any] = {**about(seeds=[0], commit=settings.commit), "device": settings.device}
    content |= {name: getattr(settings, name) for name in ("width", "heads", "depth", "layers", "platters")}
    content |= {"context_length": settings.context_length, "runs": []}
    if settings.device == "cuda":
        content["gpu"] = torch.cuda.get_device_name()
    for tuned in ("lora", "terms"):
        content["runs"].append(measured(settings, tuned))
        run = content["runs"][-1]
        peak = "not counted" if run["peak"] is None else f"{run['peak'] / 2**30:.2f} GiB"
        print(f"{tuned}: estimate {run['estimate']['total'] / 2**30:.2f} GiB, peak {peak}", flush=True)
        settings.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
