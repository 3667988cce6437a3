"""`aiether evaluate PATH` and `aiether evaluate --conformance PATH`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from ._parse import parse

FAILED = 1
_CONFORMANCE = ("path", "conformance", "context_length", "halt_q", "device", "trust_remote_code", "json")
_ONLY_LEGACY = ("legacy", "double_shift", "empty_lines")
_LEGACY = (
    *("path", "dataset_path", "context_length", "windows", "batch_size", "device", "tokenizer"),
    *("trust_remote_code", "json", *_ONLY_LEGACY),
)


@dataclass(frozen=True)
class EvaluateFlags:
    path: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="PATH",
            help="A run folder (its final model, else its newest complete checkpoint) "
            "or any Hugging Face folder.",
        ),
    ]
    conformance: Annotated[
        bool,
        tyro.conf.arg(
            help="Check the model instead: causal, the same from its cache, in batches and after padding, "
            "a gradient for every parameter. Exit status 1 where it is not so."
        ),
    ] = False
    dataset_path: Annotated[
        str | None,
        tyro.conf.arg(help="A text of any kind that aiether train takes. None: the run's validation split."),
    ] = None
    text_column: Annotated[str, tyro.conf.arg(help="Column that holds the text, where it has columns.")] = (
        "text"
    )
    token_dtype: Annotated[
        Literal["uint16", "uint32"] | None,
        tyro.conf.arg(help="Type of the ids in a .bin file. None: as the file beside it says, else uint16."),
    ] = None
    context_length: Annotated[
        int | None,
        tyro.conf.arg(
            help="Tokens of a window. None: the run's, else the model's, at most 4096. "
            "With --conformance: of the sequences tried, None: 32. With --legacy: of a line, None: 256."
        ),
    ] = None
    stride: Annotated[
        int | None,
        tyro.conf.arg(help="Windows so far apart, of which new tokens count. None: side by side."),
    ] = None
    windows: Annotated[
        int | None,
        tyro.conf.arg(help="At most so many windows, spread evenly; with --legacy the first so many lines."),
    ] = None
    batch_size: Annotated[int, tyro.conf.arg(help="Windows per forward pass.")] = 8
    against: Annotated[
        str | None,
        tyro.conf.arg(
            help="The model that this one was made of, a folder or a name on the Hub: its loss beside, the "
            "difference with its error, and the divergence from it."
        ),
    ] = None
    parity_tokens: Annotated[
        int,
        tyro.conf.arg(help="Decode so many tokens from the cache and compare with one pass; 0: leave out."),
    ] = 64
    legacy: Annotated[
        bool,
        tyro.conf.arg(
            help="Instead, the arithmetic of the reference's toroidal results, for redoing its rows: lines "
            "padded, padding counted, an unweighted mean. Not a perplexity."
        ),
    ] = False
    double_shift: Annotated[
        bool, tyro.conf.arg(help="With --legacy: the token after the next is asked for.")
    ] = False
    empty_lines: Annotated[
        bool, tyro.conf.arg(help="With --legacy: blank lines count, as lines of padding alone.")
    ] = False
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        tyro.conf.arg(help="Where to run; auto takes an accelerator if any."),
    ] = "auto"
    bf16: Annotated[bool, tyro.conf.arg(help="Mixed precision in bfloat16; without it float32.")] = False
    halt_q: Annotated[
        float | None,
        tyro.conf.arg(
            help="A model with latent reasoning: a token stops once it has stopped with this probability: 0 "
            "after one iteration, 1 after all. None: as it was trained with."
        ),
    ] = None
    tokenizer: Annotated[
        str | None, tyro.conf.arg(help="A tokenizer.json file or folder, for a model folder that has none.")
    ] = None
    cache_dir: Annotated[
        str | None,
        tyro.conf.arg(help="Where tokens are kept. None: where the run keeps them, else ~/.cache/aiether."),
    ] = None
    trust_remote_code: Annotated[
        bool, tyro.conf.arg(help="Run the code that a model's folder brings with it.")
    ] = False
    json: Annotated[bool, tyro.conf.arg(help="Print one JSON object instead of lines.")] = False


def run(arguments: Sequence[str]) -> int:
    """Print what a model's loss on a text is, or what the conformance kit says about it."""
    flags = parse(
        EvaluateFlags,
        arguments,
        "aiether evaluate",
        "Measure a model's loss on a text, or check that it keeps the promises of a causal model.",
        usage="PATH",
    )
    if flags.conformance:
        _refuse_idle(flags, _CONFORMANCE, "is about a text; --conformance reads none: leave one of them out")
        return _conformance(flags)
    if flags.legacy:
        _refuse_idle(flags, _LEGACY, "has no meaning in the legacy arithmetic: leave one of them out")
        return _legacy(flags)
    usual = [each.name for each in fields(flags) if each.name not in _ONLY_LEGACY]
    _refuse_idle(flags, usual, "belongs to the legacy arithmetic: give --legacy too")
    return _evaluate(flags)


def _refuse_idle(flags: EvaluateFlags, allowed: Sequence[str], why: str) -> None:
    """ValueError for a flag that is given and would do nothing."""
    idle = [
        each.name
        for each in fields(flags)
        if each.name not in allowed and getattr(flags, each.name) != each.default
    ]
    if idle:
        raise ValueError(f"--{idle[0]} {why}")


def _evaluate(flags: EvaluateFlags) -> int:
    from aiether.training.evaluate import evaluate

    from ._progress import phase_progress

    left_out = ("conformance", "json", *_ONLY_LEGACY)
    settings = {key: value for key, value in asdict(flags).items() if key not in left_out}
    with phase_progress() as progress:
        found = evaluate(**settings, progress=progress)
    print(json.dumps(found.to_dict(), indent=2) if flags.json else found)
    return 0


def _legacy(flags: EvaluateFlags) -> int:
    from aiether.training.legacy import evaluate_legacy

    settings = {key: value for key, value in asdict(flags).items() if key in _LEGACY}
    del settings["json"], settings["legacy"]
    found = evaluate_legacy(lines=settings.pop("windows"), **settings)
    print(json.dumps(found.to_dict(), indent=2) if flags.json else found)
    return 0


def _conformance(flags: EvaluateFlags) -> int:
    from aiether.training.evaluate import conformance

    report: Any = conformance(
        flags.path,
        length=flags.context_length,
        halt_q=flags.halt_q,
        device=flags.device,
        trust_remote_code=flags.trust_remote_code,
    )
    print(json.dumps(report.to_dict(), indent=2) if flags.json else report)
    return 0 if report.passed else FAILED
