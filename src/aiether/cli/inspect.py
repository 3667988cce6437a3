"""`aiether inspect CHECKPOINT CHECKPOINT CHECKPOINT ...`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ._parse import parse

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aiether.geometry import GeometryMetrics
    from aiether.integrations.offline import Inspection

COLUMNS = ("τ", "τ\nnorm.", "κ", "κ\nnorm.", "ρ", "partic.\nratio", "displace-\nment")


@dataclass(frozen=True)
class InspectFlags:
    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="CHECKPOINTS",
            help="At least three checkpoints of one run, of any kind that aiether grow reads, or single "
            "safetensors files.",
        ),
    ]
    output: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="FILE",
            help="Write a report to this .html file and the numbers to a .json beside it, or a .json alone.",
        ),
    ] = None
    per_tensor: Annotated[bool, tyro.conf.arg(help="Print every tensor too; the files always hold them.")] = (
        False
    )


def run(arguments: Sequence[str]) -> int:
    """Print the geometry of a series of checkpoints, and write it if asked."""
    flags = parse(
        InspectFlags,
        arguments,
        "aiether inspect",
        "Measure the path that a model's weights took through a series of checkpoints.",
        usage="CHECKPOINTS...",
    )
    output = None if flags.output is None else Path(flags.output)
    if output and (output.suffix not in (".html", ".json") or not output.parent.is_dir()):
        raise ValueError(f"output is {flags.output!r}: name a .html or .json file in a folder that exists")
    from rich.console import Console

    from aiether.integrations import raise_interrupts, write_json
    from aiether.integrations.offline import inspect_checkpoints

    from ._progress import bytes_progress

    with raise_interrupts(), bytes_progress("reading") as progress:
        inspection = inspect_checkpoints(flags.checkpoints, progress)
    show(inspection, Console(), per_tensor=flags.per_tensor)
    if output:
        write_json(output.with_suffix(".json"), inspection.to_dict())
        if output.suffix == ".html":
            from aiether.training.report import write_inspection

            write_inspection(inspection, output)
        print(output)
    return 0


def show(inspection: Inspection, console: Console, *, per_tensor: bool) -> None:
    """The table: a row for the model, for each layer and for each tensor outside of the layers."""
    model = inspection.model
    names = " → ".join(name for name, _ in inspection.checkpoints)
    console.print(f"{names}\n{inspection.interval_note()}", highlight=False, markup=False)
    table = _table(f"S = {model.num_snapshots}; normalised: 0 straight line, 1 random walk; ρ ≥ "
                   f"{model.rho_bound:.2f}, straight line {model.rho_straight:.2f}")  # fmt: skip
    _add(table, "all tensors", model)
    for layer in inspection.layers:
        _add(table, inspection.label(layer), layer.metrics)
        if per_tensor:
            for tensor in layer.tensors:
                _add(table, f"  {tensor.name.removeprefix(layer.name + '.')}", tensor.metrics)
    for tensor in inspection.others:
        _add(table, tensor.name, tensor.metrics)
    console.print(table)
    if inspection.skipped:
        console.print(f"not measured (no floating-point numbers): {_some(inspection.skipped)}", markup=False)


def _table(caption: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=caption, caption_justify="left"
    )
    table.add_column("", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, metrics: GeometryMetrics) -> None:
    from rich.text import Text

    from aiether.training import _format as fmt

    table.add_row(Text(name), *fmt.geometry(metrics))


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first
