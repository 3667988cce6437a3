"""Training speed on a GPU: against a plain loop, and of GPT-2 124M's shape.

    python benchmarks/throughput.py --data DIR [--probe LOOP.py] [--steps 800] [--out RESULT.json]

DIR holds train.bin and val.bin (uint16 tokens). Each figure is training seconds without evaluations,
checkpoints and compiling (a short run of the same shapes goes first), and the median of `--repeats`.

- grown: 3 to 6 to 12 layers at 20 % and 50 % of the steps, width 512, 64 windows of 512 tokens, bf16, through
  `fit`, for AdamW and Muon. With --probe, a script called as `LOOP.py DATA_DIR OUT.jsonl CONFIG.json` trains
  the same recipe in between, and the ratio of the two is given.
- gpt2: 12 layers of width 768 with 50,257 tokens, AdamW; the share of the GPU's dense bf16 peak is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from _machine import about
from aiether.data import PackedData, TokenFile
from aiether.evaluation import flops_per_token, mfu
from aiether.integrations import fit
from aiether.training.arms import new_model, windows
from aiether.training.config import TrainConfig
from aiether.training.trainer import build_trainer

SHAPE: dict[str, Any] = {
    "n_layer": 3,
    "max_layers": 12,
    "n_head": 8,
    "n_embd": 512,
    "context_length": 512,
    "batch_size": 64,
    "dropout": 0.0,
    "lr": 1e-3,
    "schedule": "wsd",
    "bf16": True,
    "compile": True,
    "protocol": "none",
    "placement": "stack",
    "init": "copy",
    "trigger": "fixed",
    "grow_to": (6, 12),
    "growth_fractions": (0.2, 0.5),
    "eval_batches": 2,
}


def tokens(directory: Path, vocab_size: int) -> PackedData:
    files = {name: TokenFile(directory / f"{name}.bin", "<u2") for name in ("train", "val")}
    return PackedData(
        train=files["train"],
        validation=files["val"],
        tokenizer_dir=None,
        vocab_size=vocab_size,
        eos_token_id=0,
        fingerprint="",
        source=str(directory),
        num_documents=0,
        train_bytes=None,
        validation_bytes=None,
        bytes_per_token=None,
    )


def seconds_of_fit(config: TrainConfig, data: PackedData, steps: int) -> float:
    config = replace(config, max_steps=steps, eval_interval_steps=config.eval_interval_steps or steps)
    train, validation = windows(config, data, steps)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        model = new_model(config, data, config.n_layer)
        trainer = build_trainer(config, model, train, validation, max_steps=steps, output_dir=Path(directory))
        trainer.args.save_strategy = "no"
        result = fit(
            trainer, config, output_dir=directory, compile=config.compile, cuda_graphs=config.cuda_graphs
        )
    torch.cuda.empty_cache()
    return result.train_seconds


def seconds_of_probe(probe: Path, data: Path, steps: int, muon: bool) -> float:
    base = {
        "seed": 0, "T": 512, "B": 64, "V": 16384, "d": 512, "h": 8, "L": 12, "L0": 3, "lr": 1e-3, "warm": 100,
        "decay": 0.2, "init": "copy", "place": "stack", "grow": [[0.2, 6], [0.5, 12]], "muon": muon,
        "eval_batches": 2,
    }  # fmt: skip
    runs = [{"name": name, "steps": n, "eval_every": n} for name, n in (("warm-up", 30), ("run", steps))]
    with tempfile.TemporaryDirectory() as directory:
        out, config = Path(directory, "out.jsonl"), Path(directory, "config.json")
        config.write_text(json.dumps({"base": base, "runs": runs}))
        subprocess.run([sys.executable, probe, data, out, config], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    return next(r["secs"] for r in rows if r["run"] == "run" and r.get("step") == steps and "val" in r)


def grown(data: Path, probe: Path | None, steps: int, repeats: int, optimizer: str) -> dict[str, Any]:
    config = TrainConfig(**SHAPE, optimizer=optimizer)  # type: ignore[arg-type]
    packed = tokens(data, 16384)
    seconds_of_fit(config, packed, 30)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds_of_fit(config, packed, steps))
        if probe is not None:
            theirs.append(seconds_of_probe(probe, data, steps, optimizer == "muon"))
        print(optimizer, "ours", ours, "probe", theirs, flush=True)
    row: dict[str, Any] = {"optimizer": optimizer, "steps": steps, "seconds": ours, "probe_seconds": theirs}
    if theirs:
        row["speed_over_probe"] = statistics.median(theirs) / statistics.median(ours)
    return row


def gpt2(data: Path, steps: int, repeats: int) -> dict[str, Any]:
    shape = {"n_layer": 12, "n_embd": 768, "n_head": 12, "context_length": 1024, "batch_size": 32}
    config = TrainConfig(**{**SHAPE, **shape, "trigger": "never", "grow_to": ()})
    packed = tokens(data, 50257)
    seconds_of_fit(config, packed, 10)
    seconds = [seconds_of_fit(config, packed, steps) for _ in range(repeats)]
    tokens_per_s = steps * 32 * 1024 / statistics.median(seconds)
    flops = flops_per_token(new_model(config, packed, 12).config, 1024)
    return {
        **shape,
        "vocab_size": 50257,
        "seconds": seconds,
        "steps": steps,
        "tokens_per_s": tokens_per_s,
        "mfu": mfu(tokens_per_s * flops, torch.cuda.get_device_name()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default=None, help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    data, steps, repeats = arguments.data, arguments.steps, arguments.repeats
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        **about(seeds=[0], commit=arguments.commit),
        "grown": [],
    }
    for optimizer in arguments.optimizers:
        result["grown"].append(grown(data, arguments.probe, steps, repeats, optimizer))
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    result["gpt2"] = gpt2(data, 60, repeats)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["gpt2"], indent=1))


if __name__ == "__main__":
    main()
