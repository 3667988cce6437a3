"""What stands in a record where rows are missing: one row, as long as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

_MISSING = "missing"


def is_gap(row: Mapping[str, Any]) -> bool:
    """Whether it is no row of the run. Its `step` is that of the last row before the gap."""
    return row.get("kind") == _MISSING


def with_gap(content: bytes, size: int) -> tuple[bytes, bytes, int]:
    """Make up for what is missing of a record that was cut or edited, `content` being what is left.

    Returns the whole rows that stay, a row for the gap, and the step of the last row before it. Together they
    are `size` bytes long, as the record was: whoever remembers a length of it can still cut it back there.
    """
    lines = content[: content.rfind(b"\n", 0, size) + 1].splitlines(keepends=True)
    while lines and len(_row(lines)) >= size - sum(map(len, lines)):
        lines.pop()
    kept = b"".join(lines)
    return kept, _row(lines).ljust(size - len(kept) - 1) + b"\n", _step_of(lines)


def _row(lines: Sequence[bytes]) -> bytes:
    return json.dumps({"kind": _MISSING, "step": _step_of(lines)}).encode()


def _step_of(lines: Sequence[bytes]) -> int:
    """The step of the last row that has one."""
    for line in reversed(lines):
        with suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["step"])
    return 0
