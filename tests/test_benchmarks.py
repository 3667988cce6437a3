"""What a benchmark's result says of where it was measured."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aiether.training.environment import checkout

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "_machine.py"


@pytest.fixture(scope="module")
def about() -> Callable[..., dict[str, Any]]:
    return runpy.run_path(str(SCRIPT))["about"]


def test_a_result_names_machine_versions_commit_and_seeds(about: Callable[..., dict[str, Any]]) -> None:
    told = json.loads(json.dumps(about(seeds=[3, 4], more_versions=["numpy"])))
    assert told["seeds"] == [3, 4]
    assert told["machine"]["cores"] == os.cpu_count()
    assert told["machine"]["cpu"]
    assert len(told["machine"]["load_average"]) == 3
    assert told["versions"]["torch"] == torch.__version__
    assert {"python", "aiether", "transformers", "numpy"} <= told["versions"].keys()


def test_the_commit_is_the_checkout_s_or_the_given_one_or_unknown(
    about: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    monkeypatch.delenv("AIETHER_COMMIT", raising=False)
    assert checkout(source) == {"commit": None, "source_modified": None}
    monkeypatch.setenv("AIETHER_COMMIT", "abc")
    assert checkout(source)["commit"] == "abc"
    assert about(seeds=[], commit="def")["commit"] == "def"
    monkeypatch.delenv("AIETHER_COMMIT")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert checkout(source) == {"commit": head.strip(), "source_modified": False}
    (source / "new.py").touch()
    assert checkout(source)["source_modified"] is True
