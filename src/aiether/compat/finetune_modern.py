"""`scripts/finetune_modern.py`: the flags of the reference's report, in the words of `aiether retrofit`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from aiether.cli import main as command
from aiether.cli._main import one_line_errors
from aiether.cli._parse import parse

Help = tyro.conf.arg
_ACCUMULATION, _TRANSFER, _EPOCH_STEPS = 16, 1, 2
"""Forward passes of a step, as in the report; a third of the steps is layer-wise transfer."""


@dataclass(frozen=True)
class Flags:
    model_name: Annotated[str, Help(help="A model folder, or a name on the Hub.")] = "microsoft/phi-2"
    dataset_path: Annotated[str, Help(help="The text.")] = "hub:Salesforce/wikitext:wikitext-2-raw-v1"
    layer_indices: Annotated[str, Help(help="Layers to convert, with commas between them.")] = "0"
    depth: Annotated[int, Help(help="Platters of a head.")] = 2
    lambda_distance: Annotated[float, Help(help="What a distance of 1 takes from a logit.")] = 0.1
    fusion_mode: Annotated[
        Literal["low_rank", "attention", "mean"], Help(help="How platters are mixed afterwards.")
    ] = "low_rank"
    max_length: Annotated[int, Help(help="Tokens of a window.")] = 256
    train_size: Annotated[int, Help(help="Windows to train on.")] = 200
    val_size: Annotated[int, Help(help="Windows to evaluate on.")] = 33
    epochs: Annotated[float, Help(help="Passes over the windows to train on.")] = 3.0
    learning_rate: Annotated[float, Help(help="Learning rate of the adapters.")] = 5e-4
    use_checkpoint: Annotated[bool, Help(help="Gradient checkpointing.")] = False
    output_dir: Annotated[str, Help(help="The folder to make.")] = "results/checkpoints/retrofit"
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Help(help="Where to run.")] = "auto"


def main(arguments: Sequence[str]) -> int:
    """Parse the reference's flags and run `aiether retrofit` with their values."""
    try:
        with one_line_errors("finetune_modern.py"):
            flags = parse(
                Flags, arguments, "finetune_modern.py", "Fine-tune a model with toroidal attention."
            )
            layers = _layers(flags.layer_indices)
            _check(flags)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    settings: dict[str, object] = {
        "dataset_path": flags.dataset_path,
        "output_dir": flags.output_dir,
        "platters": flags.depth,
        "lambda_distance": flags.lambda_distance,
        "fusion_mode": flags.fusion_mode,
        "context_length": flags.max_length,
        "train_size": flags.train_size,
        "val_size": flags.val_size,
        "epochs": flags.epochs,
        "lr": flags.learning_rate,
        "gradient_accumulation_steps": _ACCUMULATION,
        "transfer_steps": _TRANSFER,
        "steps": _EPOCH_STEPS,
        "device": flags.device,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    if flags.use_checkpoint:
        words.append("--gradient_checkpointing")
    return command(["retrofit", flags.model_name, "--layers", *layers, *words])


def _check(flags: Flags) -> None:
    """Refused here, by the names that are used here: `aiether retrofit` has others."""
    for name, least in (("depth", 1), ("max_length", 2), ("train_size", 1), ("val_size", 1)):
        if getattr(flags, name) < least:
            raise ValueError(f"{name} is {getattr(flags, name)}: it must be at least {least}")
    for name in ("epochs", "learning_rate"):
        if not 0 < getattr(flags, name) < math.inf:
            raise ValueError(f"{name} is {getattr(flags, name)}: it must be greater than 0")
    if not 0 <= flags.lambda_distance < math.inf:
        raise ValueError(f"lambda_distance is {flags.lambda_distance}: it must be 0 or more")


def _layers(indices: str) -> list[str]:
    words = indices.replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"layer_indices is {indices!r}: numbers with commas between them are meant, as 0,16")
    return words
