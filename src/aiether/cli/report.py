"""`aiether report RUN_DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ._parse import parse


@dataclass(frozen=True)
class ReportFlags:
    run_dir: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="RUN_DIR", help="A run folder, finished or not."),
    ]


def run(arguments: Sequence[str]) -> int:
    """Write the report of a run from its records and print where it lies."""
    flags = parse(
        ReportFlags,
        arguments,
        "aiether report",
        "Write the report of a run anew from its records.",
        usage="RUN_DIR",
    )
    from aiether.training.report import write_report

    if not (Path(flags.run_dir) / "config.yaml").is_file():
        raise ValueError(
            f"{flags.run_dir!r} holds no run (config.yaml is missing); name a folder such as runs/NAME"
        )
    print(write_report(Path(flags.run_dir)))
    return 0
