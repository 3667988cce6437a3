"""Where a benchmark was run: what every result's JSON says of its machine, versions, commit and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiether.training.environment import checkout, machine, versions


def about(
    *, seeds: Sequence[int], more_versions: Sequence[str] = (), commit: str | None = None
) -> dict[str, Any]:
    """Taken before a benchmark begins; `commit` where the tree is no git checkout."""
    own = {"commit": commit} if commit else checkout()
    return {"machine": machine(), "versions": versions(*more_versions), **own, "seeds": list(seeds)}


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process now; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0][1]) * 1024 if lines else 0
