"""`aiether halting PATH --dataset_path TEXT`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from ._parse import parse

USAGE = "aiether halting PATH --dataset_path TEXT"


@dataclass(frozen=True)
class HaltingFlags:
    path: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="PATH",
            help="A run folder (its final model, else its newest complete checkpoint) or a model folder; it "
            "stays as it is.",
        ),
    ]
    dataset_path: Annotated[
        str | None, tyro.conf.arg(help="One source of any kind that training takes; its end is held out.")
    ] = None
    output_dir: Annotated[
        str | None, tyro.conf.arg(help="The folder to make. None: PATH with -halting behind it.")
    ] = None
    batches: Annotated[int, tyro.conf.arg(help="Batches that the head is taught on.")] = 200
    batch_size: Annotated[int, tyro.conf.arg(help="Windows of a batch.")] = 8
    lr: Annotated[float, tyro.conf.arg(help="Learning rate of the head, falling to 0.")] = 0.01
    tau: Annotated[
        float, tyro.conf.arg(help="A token should stop where no later iteration gains so many nats.")
    ] = 0.01
    context_length: Annotated[
        int | None, tyro.conf.arg(help="Tokens of a window. None: the model's, at most 4096.")
    ] = None
    text_column: Annotated[str, tyro.conf.arg(help="Column that holds the text, where it has columns.")] = (
        "text"
    )
    tokenizer: Annotated[
        str | None, tyro.conf.arg(help="A tokenizer.json file or folder, for a model folder that has none.")
    ] = None
    cache_dir: Annotated[str | None, tyro.conf.arg(help="Where tokens are kept. None: ~/.cache/aiether.")] = (
        None
    )
    seed: Annotated[int, tyro.conf.arg(help="Seeds the order of the text.")] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        tyro.conf.arg(help="Where to run; auto takes an accelerator if any."),
    ] = "auto"


def run(arguments: Sequence[str]) -> int:
    """Teach a halting head, write the model with it, and print what each halt_q costs and loses."""
    flags = parse(
        HaltingFlags,
        arguments,
        "aiether halting",
        "Teach the halting head of a finished model, and nothing else of it, which tokens gain by more "
        "iterations; the model with its new head becomes a new folder.",
        usage="PATH",
    )
    if flags.dataset_path is None:
        raise ValueError(f"--dataset_path is missing: {USAGE}")
    from aiether.integrations import raise_interrupts
    from aiether.training.halting import teach_halting

    from ._progress import phase_progress

    settings: dict[str, Any] = asdict(flags)
    with raise_interrupts(), phase_progress() as progress:
        found = teach_halting(**settings, progress=progress)
    print(found)
    return 0
