"""The reference's entry points, under the import paths and flags that it documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiether.training.run import RunResult

__all__ = ["train_with_hf_trainer"]


def train_with_hf_trainer(argv: Sequence[str] | None = None) -> RunResult:
    """Train with the reference's flags and documented defaults (preset `report`); what scripts/train.py runs.

    Parameters
    ----------
    argv: the flags, as on a command line; None reads the process's own.

    Raises
    ------
    SystemExit
        With status 2 after one line on stderr, for flags, data or settings that cannot work.
    """
    import sys

    from aiether.cli._main import one_line_errors

    arguments = sys.argv[1:] if argv is None else argv
    with one_line_errors("train"):
        from aiether.cli.train import train

        return train(arguments, default_preset="report")
