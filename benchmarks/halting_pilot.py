"""What stopping early costs at the pilot's shape: the same trained weights at several values of `halt_q`.

    python benchmarks/halting_pilot.py runs/stories --device cuda         # a folder of benchmarks/texts.py
    python benchmarks/halting_pilot.py runs/stories --device cpu          # a quarter of an hour a seed

All three parts, 8 layers of width 256, context 512, 100 steps of 32 windows, AdamW. Each seed is trained
once, into `--runs`, unless it is there, and evaluated on the same held-out windows; the loss at q = 1 is
that of all iterations. Training on a GPU does not repeat bit by bit, so that runs of their own for each q
would differ by more than what is looked for. Writes benchmarks/results/halting_pilot.json.
"""

from __future__ import annotations

import argparse
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from _machine import about
from aiether.cli import main as aiether

RESULT = Path(__file__).parent / "results" / "halting_pilot.json"
SHAPE = {
    "n_layer": 8, "max_layers": 8, "n_head": 8, "n_embd": 256, "context_length": 512, "dropout": 0.0,
    "optimizer": "adamw", "lr": 0.001, "lr_warmup_steps": 20, "schedule": "cosine", "weight_decay": 0.1,
    "batch_size": 32, "max_steps": 100, "eval_interval_steps": 50, "log_interval_steps": 10,
    "save_interval_steps": 50,
}  # fmt: skip


def train(run: Path, seed: int, settings: argparse.Namespace) -> None:
    """A run of one seed, unless it is there."""
    if (run / "final").is_dir():
        return
    words = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    words += ["--dataset_path", settings.text, "--tokenizer", f"{settings.text}/tokenizer"]
    words += ["--arch", "lahr", "--lahr.condition", "full", "--trigger", "never", "--device", settings.device]
    words += [
        "--seed",
        str(seed),
        "--output_dir",
        str(run),
        *(["--bf16"] if settings.device == "cuda" else []),
    ]
    if aiether(["train", *words]) != 0:
        raise SystemExit(f"{run} did not come to its end")


def evaluated(run: Path, halt_q: float, settings: argparse.Namespace) -> dict[str, Any]:
    """Loss and mean iterations of a run that stops at `halt_q`."""
    said = io.StringIO()
    words = [str(run), "--halt_q", str(halt_q), "--device", settings.device, "--json"]
    words += ["--windows", str(settings.windows)]
    with redirect_stdout(said):
        status = aiether(["evaluate", *words])
    if status != 0:
        raise SystemExit(f"{run} could not be evaluated: {said.getvalue()}")
    return json.loads(said.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="a folder with train.bin, val.bin and tokenizer/")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--halt_q", type=float, nargs="+", default=[0.0, 0.5, 0.75, 0.9, 1.0])
    parser.add_argument("--windows", type=int, default=160, help="held-out ones, spread evenly")
    parser.add_argument("--runs", type=Path, default=Path("runs/halting_pilot"))
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=RESULT)
    settings = parser.parse_args()
    content: dict[str, Any] = {**about(seeds=settings.seeds, commit=settings.commit), "shape": SHAPE}
    content |= {"device": settings.device, "text": settings.text, "windows": settings.windows, "rows": []}
    for seed in settings.seeds:
        run = settings.runs / f"seed{seed}"
        train(run, seed, settings)
        for halt_q in settings.halt_q:
            found = evaluated(run, halt_q, settings)
            content["rows"].append({"seed": seed, "halt_q": halt_q, **found})
            print(f"seed {seed}, q = {halt_q:g}: {found}", flush=True)
        settings.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
