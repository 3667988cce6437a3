"""`aiether grow CHECKPOINT --to_layers N --output_dir DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ._parse import parse

if TYPE_CHECKING:
    from aiether.growth import GrowthConfig
    from aiether.integrations.offline import GrownCheckpoint

USAGE = "aiether grow CHECKPOINT --to_layers N --output_dir DIR"


@dataclass(frozen=True)
class GrowFlags:
    checkpoint: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="CHECKPOINT",
            help="A Hugging Face model folder, a Trainer checkpoint, a folder of "
            "torch.distributed.checkpoint, or a checkpoint or run folder of aiether.",
        ),
    ]
    to_layers: Annotated[int | None, tyro.conf.arg(help="Layers of the grown model.")] = None
    output_dir: Annotated[str | None, tyro.conf.arg(help="The folder to make; it must not exist yet.")] = None
    placement: Annotated[
        Literal["stack", "interleave", "top", "front"],
        tyro.conf.arg(
            help="Where new layers go: the whole stack again, each beside its source, on top, or below the "
            "lowest layer."
        ),
    ] = "stack"
    init: Annotated[
        Literal["geometric", "copy", "zero", "random", "noise"],
        tyro.conf.arg(
            help="How new layers start: extrapolated from --history, copied, copied with zero output "
            "(function kept), drawn anew, or copied with noise."
        ),
    ] = "copy"
    history: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="Earlier checkpoints of the same run, at least two, for --init geometric."),
    ] = ()
    moments: Annotated[
        Literal["zero", "copy", "reset"],
        tyro.conf.arg(help="Optimizer moments of new tensors: zero, their source's, or all dropped."),
    ] = "zero"
    config: Annotated[
        str | None, tyro.conf.arg(help="The model's config.json, for a checkpoint that has none beside it.")
    ] = None
    max_layers: Annotated[
        int | None, tyro.conf.arg(help="The planned final depth, for --init random. None: to_layers.")
    ] = None
    max_shard_size: Annotated[str, tyro.conf.arg(help="Limit of one safetensors file.")] = "5GB"
    seed: Annotated[int, tyro.conf.arg(help="Seeds what is drawn.")] = 0
    noise: Annotated[float | None, tyro.conf.arg(help="Relative norm of the noise. None: 0.2.")] = None
    beta0: Annotated[float | None, tyro.conf.arg(help="Base gain of the velocity term.")] = None
    gamma0: Annotated[float | None, tyro.conf.arg(help="Base gain of the curvature correction.")] = None
    eta0: Annotated[float | None, tyro.conf.arg(help="Base gain of the escape term.")] = None
    scale: Annotated[
        Literal["unit", "displacement"] | None,
        tyro.conf.arg(help="Terms of unit length, or as long as the displacement. None: displacement."),
    ] = None


def run(arguments: Sequence[str]) -> int:
    """Grow a checkpoint on the disk and say what was done."""
    flags = parse(
        GrowFlags,
        arguments,
        "aiether grow",
        "Grow a checkpoint into a deeper one, in pieces: it may be larger than memory. What is not given of "
        "the initialiser's settings is as in preset recommended.",
        usage="CHECKPOINT",
    )
    for name in ("to_layers", "output_dir"):
        if getattr(flags, name) is None:
            raise ValueError(f"--{name} is missing: {USAGE}")
    assert flags.to_layers is not None
    assert flags.output_dir is not None
    from aiether.integrations import raise_interrupts
    from aiether.integrations.offline import grow_checkpoint

    from ._progress import bytes_progress

    with raise_interrupts(), bytes_progress("growing") as progress:
        grown = grow_checkpoint(
            flags.checkpoint,
            flags.output_dir,
            to_layers=flags.to_layers,
            growth=growth_config(flags),
            history=flags.history,
            config=flags.config,
            max_layers=flags.max_layers,
            seed=flags.seed,
            max_shard_size=flags.max_shard_size,
            progress=progress,
        )
    print("\n".join(summary(grown)))
    return 0


def growth_config(flags: GrowFlags) -> GrowthConfig:
    """The recommended settings with what the flags say."""
    from aiether.growth import GROWTH_PRESETS, GrowthConfig

    named = ("placement", "init", "moments", "noise", "beta0", "gamma0", "eta0", "scale")
    given = {name: getattr(flags, name) for name in named if getattr(flags, name) is not None}
    return GrowthConfig(**{**GROWTH_PRESETS["recommended"], **given})


def summary(grown: GrownCheckpoint) -> list[str]:
    """What was done, and how to go on."""
    lines = [grown.plan.describe(), f"{grown.path}: {grown.nbytes / 1e6:,.1f} MB"]
    if grown.kind == "trainer":
        lines.append(
            f"go on from step {grown.step:,} with trainer.train(resume_from_checkpoint={str(grown.path)!r}), "
            "the Trainer being built around from_pretrained of the same folder, with the same arguments"
        )
    elif grown.kind == "aiether":
        lines.append("weights only: a run of aiether grows by itself, with its optimizer's state")
    return lines
