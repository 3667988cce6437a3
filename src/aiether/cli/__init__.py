"""The command line: parse, call, print. Nothing here decides anything about training."""

from __future__ import annotations

from ._main import main

__all__ = ["main"]
