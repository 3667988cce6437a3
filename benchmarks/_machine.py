"""Where a benchmark was run: what every result's JSON says of its machine, versions, commit and seeds."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiether

VERSIONS = ("torch", "transformers")


def about(
    *, seeds: Sequence[int], more_versions: Sequence[str] = (), commit: str | None = None
) -> dict[str, Any]:
    """Taken before a benchmark begins; `commit` where the tree is no git checkout."""
    own = {"commit": commit} if commit else checkout()
    return {"machine": machine(), "versions": versions(*more_versions), **own, "seeds": list(seeds)}


def machine() -> dict[str, Any]:
    """The processor, and how busy it is: the load average over 1, 5 and 15 minutes."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(*more: str) -> dict[str, str]:
    """Of Python, of what every benchmark runs on, and of `more` packages."""
    own = {"python": platform.python_version(), "aiether": aiether.__version__}  # it may run uninstalled
    return own | {name: version(name) for name in (*VERSIONS, *more)}


def checkout() -> dict[str, Any]:
    """The commit, and whether src differs from it; None where this is no git checkout."""
    status = git("status", "--porcelain", "../src")
    return {"commit": git("rev-parse", "HEAD"), "source_modified": None if status is None else bool(status)}


def git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process now; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0][1]) * 1024 if lines else 0
