"""`aiether triggers RUN_DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ._parse import parse


@dataclass(frozen=True)
class TriggersFlags:
    run_dir: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="RUN_DIR", help="A run folder, finished or not."),
    ]
    quantiles: Annotated[
        tuple[float, ...],
        tyro.conf.arg(help="Quantiles of the history at which thresholds are taken."),
    ] = (0.5, 0.6, 0.7, 0.8, 0.9)


def run(arguments: Sequence[str]) -> int:
    """Print when each trigger would have grown the model of a run, depth by depth."""
    flags = parse(
        TriggersFlags,
        arguments,
        "aiether triggers",
        "Ask every trigger again about a recorded run: when would it have grown the model?",
        usage="RUN_DIR",
    )
    from aiether.training.trigger_table import trigger_table

    print(trigger_table(Path(flags.run_dir), flags.quantiles))
    return 0
