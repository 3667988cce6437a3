"""Real runs in real worker processes: paired, killed, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.study.fakes import Silent
from tests.study.test_spec import study

from aiether.study.cell import Outcome, run_cell
from aiether.study.pool import Backend, LocalWorkers, Order
from aiether.study.results import read_rows, without_timings
from aiether.study.runner import run_study
from aiether.study.spec import spec_from


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("text")
    (place / "text.txt").write_text("\n".join(f"line {number} of a small text" for number in range(4000)))
    grown = {"n_layer": 1, "max_layers": 2}
    found = study(
        baseline=None,
        seeds=1,
        budget={"steps": 40},
        comparisons=[],
        allow_identical_arms=True,
        conditions={"one": {"settings": grown}, "twin": {"settings": grown}},
    )
    found["base"] |= {"dataset_path": str(place / "text.txt"), "cache_dir": str(place / "cache")}
    found["base"] |= {"vocab_size": 300, "device": "cpu", "eval_interval_steps": 8, "save_interval_steps": 4}
    return found


def carry_out(content: dict[str, Any], folder: Path, place: Backend) -> dict[str, Any]:
    told = "aiether study run small.yaml"
    result = run_study(spec_from(content), folder, Silent(), backend=lambda threads: place, command=told)
    assert result.exit_status == 0, result.failures
    return json.loads((folder / "results.json").read_text())


def curve(folder: Path) -> list[dict[str, Any]]:
    """All that training said, but for what clocks measured."""
    clocks = ("elapsed_s", "steps_per_s", "tokens_per_s", "eval_seconds", "eval_steps_per_s")
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows]


class Here:
    """Runs in this process, which has imported all that a worker would have to."""

    slots = 1

    def __init__(self) -> None:
        self._order: Order | None = None

    def submit(self, order: Order) -> None:
        self._order = order

    def wait(self, timeout_s: float) -> list[tuple[Order, Outcome]]:
        order = self._order
        assert order is not None
        return [(order, run_cell(order.folder, order.settings, keep_models=order.keep_models))]

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        yield from ()

    def close(self) -> None: ...


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_twins_are_equal_in_every_bit_and_a_killed_worker_changes_nothing(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder)
    monkeypatch.setattr("aiether.training.samples.NEW_TOKENS", 20)  # of the runs here; a sample is no result
    undisturbed = carry_out(content, tmp_path / "a", Here())
    one, twin = (tmp_path / "a" / "cells" / name / "1-seed0" for name in ("one", "twin"))
    assert curve(one) == curve(twin)
    assert [row["depth"] for row in curve(one)][-1] == 2

    place = LocalWorkers(1, threads=1)
    killer = threading.Thread(
        target=kill_in_training, args=(place, tmp_path / "b" / "cells" / "one" / "1-seed0")
    )
    killer.start()
    disturbed = carry_out(content, tmp_path / "b", place)
    killer.join()
    (_, attempt) = read_rows(tmp_path / "b" / "attempts.jsonl")
    assert attempt["reason"] == "its process ended with signal SIGKILL"
    assert without_timings(disturbed) == without_timings(undisturbed)


def kill_in_training(place: LocalWorkers, run: Path) -> None:
    while not any(row["kind"] == "eval" for row in read_rows(run / "metrics.jsonl")):
        time.sleep(0.01)
    (process,) = place.processes
    os.kill(process.pid, signal.SIGKILL)


def test_a_worker_ends_with_whoever_started_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "aiether.study.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.communicate(timeout=30)
    assert process.returncode == 0
