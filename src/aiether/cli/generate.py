"""`aiether generate PATH PROMPT`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from ._parse import parse


@dataclass(frozen=True)
class GenerateFlags:
    path: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="PATH",
            help="A run folder (its final model, else its newest complete checkpoint) "
            "or any Hugging Face folder.",
        ),
    ]
    prompt: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT", help="The text to continue.")
    ]
    max_new_tokens: Annotated[int, tyro.conf.arg(help="Tokens to add at most.")] = 200
    temperature: Annotated[
        float, tyro.conf.arg(help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.8
    top_k: Annotated[int | None, tyro.conf.arg(help="Sample among the k likeliest tokens only.")] = None
    top_p: Annotated[
        float, tyro.conf.arg(help="Sample among the likeliest tokens that together hold this probability.")
    ] = 1.0
    halt_q: Annotated[
        float | None,
        tyro.conf.arg(
            help="A model with latent reasoning: a token stops once it has stopped with this probability: 0 "
            "after one iteration, 1 after all. None: as it was trained with."
        ),
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="The same seed gives the same text on the same machine.")] = 0
    tokenizer: Annotated[
        str | None, tyro.conf.arg(help="A tokenizer.json file or folder, for a model folder that has none.")
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        tyro.conf.arg(help="Where to run; auto takes an accelerator if any."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, tyro.conf.arg(help="Run the code that a model's or tokenizer's folder brings with it.")
    ] = False


def run(arguments: Sequence[str]) -> int:
    """Print the prompt and its continuation."""
    flags = parse(
        GenerateFlags,
        arguments,
        "aiether generate",
        "Continue a prompt with the model of a run or of any Hugging Face folder.",
        usage="PATH PROMPT",
    )
    from aiether.training.generate import generate

    print(generate(**asdict(flags)))
    return 0
