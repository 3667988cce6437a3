"""Where something was measured: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import aiether
from aiether.data import PackedData

COMMIT_VARIABLE = "AIETHER_COMMIT"
"""Names the commit where the source is no git checkout, or one that says nothing (in a container, say)."""


def environment(data: PackedData) -> dict[str, Any]:
    """The versions, the machine and the data that a run's result depends on."""
    return {
        "run_id": secrets.token_hex(6),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "aiether": aiether.__version__,
        **checkout(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "data": source_of(data),
    }


def source_of(data: PackedData) -> dict[str, Any]:
    """What a run's data is, and how it is known again."""
    return {"source": data.source, "fingerprint": data.fingerprint, "documents": data.num_documents}


def machine() -> dict[str, Any]:
    """The processor, and how busy it is: the load average over 1, 5 and 15 minutes."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(*more: str) -> dict[str, str]:
    """Of Python, of what everything here runs on, and of `more` packages."""
    own = {"python": platform.python_version(), "aiether": aiether.__version__}  # it may run uninstalled
    return own | {name: version(name) for name in ("torch", "transformers", *more)}


def checkout(source: Path = Path(aiether.__file__).parents[1]) -> dict[str, Any]:
    """The commit of the checkout whose `src` folder this is, and whether src differs from it.

    AIETHER_COMMIT wins over it; None where there is neither.
    """
    if (named := os.environ.get(COMMIT_VARIABLE)) is not None:
        return {"commit": named, "source_modified": None}
    status = _git(source, "status", "--porcelain", ".") if source.name == "src" else None
    if status is None:
        return {"commit": None, "source_modified": None}
    return {"commit": _git(source, "rev-parse", "HEAD"), "source_modified": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
