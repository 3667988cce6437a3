"""A share of benchmarks/fuzz.py: whatever is drawn ends in success or in one line and status 2."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
EXAMPLES = {"config": 10, "flags": 10, "data": 4, "damage": 4}


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    specification = importlib.util.spec_from_file_location("fuzz_benchmark", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as where a script is started
        specification.loader.exec_module(module)
    yield module
    del sys.modules[specification.name]


@pytest.mark.slow
def test_no_example_ends_in_a_traceback(fuzz: Any) -> None:
    with fuzz.open_bench() as bench:
        tallies = fuzz.fuzz(bench, EXAMPLES)
    assert [failure for tally in tallies.values() for failure in tally.failures] == []
    assert {kind: tally.examples for kind, tally in tallies.items()} == EXAMPLES
    ended = {status for tally in tallies.values() for status in tally.statuses}
    assert {"0", "2"} <= ended, "only one way to end was tried"


def test_the_judge_knows_a_bad_end(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> int:
        match arguments[0]:
            case "raise":
                raise KeyError("x")
            case "mute":
                return 2
            case "two":
                print("aiether train: a first line\naiether train: a second line", file=sys.stderr)
                return 2
            case "empty":
                print("aiether train: ", file=sys.stderr)
                return 2
            case "hang":
                while True:
                    pass
            case "odd":
                return 1
            case _:
                print("aiether train: lr is nan: it must be greater than 0", file=sys.stderr)
                return 2

    monkeypatch.setattr(fuzz, "aiether", command)
    monkeypatch.setattr(fuzz, "TIMEOUT_S", 1)
    for word in ("raise", "mute", "two", "empty", "hang", "odd"):
        assert fuzz.run([word]).fault is not None
    assert fuzz.run(["refuse"]).fault is None
