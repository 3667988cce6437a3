"""`aiether retrofit MODEL --layers 0 --dataset_path TEXT --output_dir DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from aiether.toroidal.settings import Backend, Distance, FusionMode, ToroidalSettings

from ._parse import parse

if TYPE_CHECKING:
    from aiether.retrofitting import RetrofitJob

USAGE = "aiether retrofit MODEL --layers 0 --dataset_path TEXT --output_dir DIR"
Help = tyro.conf.arg


@dataclass(frozen=True)
class RetrofitFlags:
    model: Annotated[
        tyro.conf.Positional[str],
        Help(metavar="MODEL", help="A model or run folder, or a name on the Hub; it stays as it is."),
    ]
    dataset_path: Annotated[
        str | None, Help(help="One source of any kind that training takes; its end is held out.")
    ] = None
    output_dir: Annotated[
        str | None,
        Help(help="The folder to make, or to go on with. Without it, --suggest_layers only compares layers."),
    ] = None
    layers: Annotated[tuple[int, ...] | None, Help(help="Layers to convert, from 0.")] = None
    suggest_layers: Annotated[
        int | None, Help(help="Convert so many of the layers whose conversion costs least, measured.")
    ] = None
    platters: Annotated[int, Help(help="Platters D of a head.")] = 2
    period: Annotated[int, Help(help="Tokens around the ring.")] = 2048
    distance: Annotated[Distance, Help(help="Distance on the ring; both are 1/2 at half a period.")] = (
        "chordal"
    )
    lambda_distance: Annotated[float, Help(help="What a distance of 1 takes from a logit.")] = 2.0
    gate: Annotated[float, Help(help="Share of a score that is the platter's own.")] = 0.5
    cross: Annotated[float, Help(help="Added to scores between different platters.")] = -2.0
    fusion_mode: Annotated[FusionMode, Help(help="How platters are mixed afterwards.")] = "low_rank"
    fusion_rank: Annotated[int, Help(help="Rank of the mixing, of low_rank and attention.")] = 1
    lambda_range: Annotated[
        float, Help(help="Lambda is learned between its target divided by and times this; 1 fixes it.")
    ] = 2.0
    token_lambda: Annotated[bool, Help(help="Lambda is learned per token too, not per head alone.")] = True
    cross_range: Annotated[float, Help(help="Cross scores are learned within so much of it.")] = 2.0
    platter_rotary: Annotated[bool, Help(help="Turn platters against each other by their angles.")] = False
    shuffled: Annotated[bool, Help(help="A control: places stand on the ring in a random order.")] = False
    sinks: Annotated[int, Help(help="First tokens that no distance is taken from.")] = 4
    window: Annotated[int | None, Help(help="How far a token sees around the ring. None: everywhere.")] = None
    backend: Annotated[
        Backend, Help(help="Kernels to tune by; cudnn is the fastest for several platters. Not stored.")
    ] = "auto"
    tune: Annotated[
        Literal["lora", "full", "terms"],
        Help(
            help="What learns beside the terms: LoRA or all weights of these layers' attention, or nothing."
        ),
    ] = "lora"
    lora_rank: Annotated[int, Help(help="Rank of the adapters.")] = 8
    lora_alpha: Annotated[float, Help(help="Their outputs are multiplied by this over the rank.")] = 16.0
    transfer_steps: Annotated[int, Help(help="Steps of layer-wise attention transfer, at first.")] = 40
    steps: Annotated[int, Help(help="Steps of the whole model, afterwards.")] = 80
    epochs: Annotated[
        float | None, Help(help="Epochs instead of steps; transfer keeps its share of them.")
    ] = None
    ramp: Annotated[float, Help(help="Share of the steps over which the torus comes in.")] = 0.5
    batch_size: Annotated[int, Help(help="Windows of a forward pass.")] = 1
    gradient_accumulation_steps: Annotated[int, Help(help="Forward passes of a step.")] = 16
    lr: Annotated[float, Help(help="Learning rate of adapters or weights.")] = 5e-4
    terms_lr: Annotated[float, Help(help="Learning rate of lambda, cross scores and fusion.")] = 1e-2
    kl_weight: Annotated[
        float, Help(help="Share of the divergence from the model as it was; cross-entropy has the rest.")
    ] = 0.5
    hidden_weight: Annotated[
        float,
        Help(help="Weight of the distance of hidden states from the original model's, added to both losses."),
    ] = 0.0
    train_size: Annotated[int | None, Help(help="Windows to train on. None: all but the last.")] = None
    val_size: Annotated[
        int | None, Help(help="Windows at the end to evaluate on. None: a tenth, at most 64.")
    ] = None
    context_length: Annotated[
        int | None, Help(help="Tokens of a window. None: the model's, at most 4096.")
    ] = None
    gradient_checkpointing: Annotated[
        bool, Help(help="Keep a layer's input and compute its inside again.")
    ] = False
    bf16: Annotated[bool, Help(help="Compute in bfloat16; what is trained stays float32.")] = False
    text_column: Annotated[str, Help(help="Column that holds the text, where it has columns.")] = "text"
    tokenizer: Annotated[
        str | None, Help(help="A tokenizer.json file or folder, for a model folder that has none.")
    ] = None
    cache_dir: Annotated[str | None, Help(help="Where tokens are kept. None: ~/.cache/aiether.")] = None
    save_interval: Annotated[int, Help(help="Steps between two states to go on from.")] = 50
    seed: Annotated[int, Help(help="Seeds the order of the text and the adapters.")] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], Help(help="Where to run; auto takes an accelerator if any.")
    ] = "auto"
    trust_remote_code: Annotated[bool, Help(help="Run code that comes with the model.")] = False


def run(arguments: Sequence[str]) -> int:
    """Convert layers to toroidal attention, tune them, write the model; or compare layers."""
    flags = parse(
        RetrofitFlags,
        arguments,
        "aiether retrofit",
        "Give layers of a trained model toroidal attention: converted exactly, moved to the torus step by "
        "step while they learn, and written as what differs. Stopped, the same command goes on.",
        usage="MODEL",
    )
    for name in ("dataset_path",) if flags.suggest_layers is not None else ("dataset_path", "output_dir"):
        if getattr(flags, name) is None:
            raise ValueError(f"--{name} is missing: {USAGE}")
    from aiether.integrations import raise_interrupts
    from aiether.retrofitting import compare_layers, run_retrofit

    from ._progress import phase_progress

    job = job_of(flags)
    with raise_interrupts(), phase_progress() as progress:
        found: object
        if flags.output_dir is None:
            found = compare_layers(job, progress)
        else:
            found = run_retrofit(job, progress, tell=lambda line: print(line, file=sys.stderr))
    print(found)
    return 0


def job_of(flags: RetrofitFlags) -> RetrofitJob:
    """The flags as the job has them."""
    from aiether.retrofitting import RetrofitJob, TuneConfig

    given: dict[str, Any] = {each.name: getattr(flags, each.name) for each in fields(flags)}
    given["accumulation"] = given.pop("gradient_accumulation_steps")
    if given["accumulation"] < 1:
        raise ValueError(f"gradient_accumulation_steps is {given['accumulation']}: it must be at least 1")
    given["output_dir"] = given["output_dir"] or ""
    parts: dict[str, Any] = {
        name: kind(**{each.name: given.pop(each.name) for each in fields(kind) if each.name in given})
        for name, kind in (("settings", ToroidalSettings), ("tuning", TuneConfig))
    }
    return RetrofitJob(**given, **parts)
