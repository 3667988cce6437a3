"""Growing a checkpoint larger than it may take in memory: anonymous memory, and speed against plain copying.

    python benchmarks/offline_growth.py --gigabytes 3

A sharded Llama-like checkpoint is made from random numbers and grown to twice its depth by `aiether grow`
in a child process, whose anonymous memory (RssAnon of /proc/PID/status) is sampled. In turns with it, `cp`
copies as many bytes: the grown folder, source and target on the same disk. Both begin without the files in
the page cache and end when everything is on the disk. Writes benchmarks/results/offline_growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import about, anonymous_bytes

RESULT = Path(__file__).parent / "results" / "offline_growth.json"
TARGETS = {"peak_anonymous_mb": 600, "speed_against_copy": 0.5}
_SAMPLE_S = 0.02
_SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
CHILD = """
import sys, time
import aiether.integrations.offline
from aiether.cli import main
started = time.monotonic()
status = main(sys.argv[1:])
print(time.monotonic() - started)
sys.exit(status)
"""


def make_checkpoint(folder: Path, gigabytes: float, dtype: str) -> int:
    """Write a model of about that size, shard by shard; returns its number of layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, inner, kind = _SHAPE["hidden_size"], _SHAPE["intermediate_size"], getattr(torch, dtype)
    layer = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    outside = {
        "model.embed_tokens.weight": (_SHAPE["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (_SHAPE["vocab_size"], hidden),
    }
    layer_bytes = sum(torch.Size(shape).numel() for shape in layer.values()) * kind.itemsize
    outside_bytes = sum(torch.Size(shape).numel() for shape in outside.values()) * kind.itemsize
    depth = max(1, round((gigabytes * 1e9 - outside_bytes) / layer_bytes))
    LlamaConfig(**_SHAPE, num_hidden_layers=depth, dtype=dtype).save_pretrained(folder)
    shards = [outside, *({f"model.layers.{i}.{n}": s for n, s in layer.items()} for i in range(depth))]
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.randn(s, generator=generator).mul_(0.02).to(kind) for n, s in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": outside_bytes + depth * layer_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return depth


def forget(folder: Path) -> None:
    """Write a folder's files out and drop them from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def grow(source: Path, target: Path, *flags: str) -> dict[str, Any]:
    """`aiether grow` in a child process, with its memory sampled. The time leaves the imports out."""
    command = ["grow", str(source), "--output_dir", str(target), *flags]
    _, loaded = run([sys.executable, "-c", "import aiether.integrations.offline"])
    printed, peak = run([sys.executable, "-c", CHILD, *command])
    seconds = float(printed.splitlines()[-1])
    return {
        "seconds": round(seconds, 2),
        "megabytes_per_s": round(folder_bytes(target) / 1e6 / seconds, 1),
        "peak_anonymous_mb": round(peak / 1e6),
        "anonymous_when_loaded_mb": round(loaded / 1e6),
    }


def run(command: list[str]) -> tuple[str, int]:
    """What a process prints, and its peak of anonymous bytes."""
    peak = 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(_SAMPLE_S)
        if process.returncode:
            raise SystemExit(f"{command} ended with status {process.returncode}")
        out.seek(0)
        return out.read(), peak


def copy(source: Path, target: Path) -> dict[str, Any]:
    """`cp` of a folder, until it is on the disk."""
    nbytes, started = folder_bytes(source), time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 2), "megabytes_per_s": round(nbytes / 1e6 / seconds, 1)}


def measure(place: Path, gigabytes: float, dtype: str, rounds: int, init: str) -> dict[str, Any]:
    source, grown = place / "model", place / "grown"
    depth = make_checkpoint(source, gigabytes, dtype)
    flags = ["--to_layers", str(2 * depth), "--init", init]
    turns = []
    for _ in range(rounds):
        shutil.rmtree(grown, ignore_errors=True)
        forget(source)
        turn: dict[str, Any] = {"grow": grow(source, grown, *flags)}
        forget(grown)
        turn["copy"] = copy(grown, place / "copy")
        shutil.rmtree(place / "copy")
        turn["speed_against_copy"] = round(
            turn["grow"]["megabytes_per_s"] / turn["copy"]["megabytes_per_s"], 3
        )
        turn["load_average"] = os.getloadavg()[0]
        turns.append(turn)
        print(json.dumps(turn), flush=True)
    return {
        "layers": [depth, 2 * depth],
        "init": init,
        "dtype": dtype,
        "source_bytes": folder_bytes(source),
        "grown_bytes": folder_bytes(grown),
        "turns": turns,
        "peak_anonymous_mb": max(turn["grow"]["peak_anonymous_mb"] for turn in turns),
        "speed_against_copy": min(turn["speed_against_copy"] for turn in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--init", default="copy", choices=["copy", "zero", "noise", "random"])
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    where = about(seeds=[0], more_versions=["safetensors"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        row = measure(Path(folder), arguments.gigabytes, arguments.dtype, arguments.rounds, arguments.init)
    result = {
        **where,
        "targets": TARGETS,
        **row,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"peak {row['peak_anonymous_mb']} MB anonymous, {row['speed_against_copy']:.2f} of cp's speed")


if __name__ == "__main__":
    main()
