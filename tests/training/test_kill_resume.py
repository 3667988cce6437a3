"""Killed with SIGKILL or interrupted with Ctrl-C, then resumed: the same bits as the run left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.corpus import write_corpus

DRIVER = Path(__file__).with_name("kill_driver.py")
TIMINGS = {"elapsed_s", "eval_seconds", "eval_steps_per_s", "seconds", "steps_per_s", "tokens_per_s"}
STEPS = 40
SETTINGS: dict[str, Any] = {
    "vocab_size": 300,
    "validation_fraction": 0.1,
    "arch": "gpt2",
    "n_layer": 1,
    "max_layers": 4,
    "n_head": 2,
    "n_embd": 16,
    "context_length": 16,
    "dropout": 0.1,
    "max_steps": STEPS,
    "batch_size": 4,
    "lr_warmup_steps": 4,
    "optimizer": "muon",
    "trigger": "geometric",
    "tau_crit": 1e-6,
    "kappa_crit": 1e-6,
    "pg_patience": 1,
    "pg_threshold": 10.0,
    "warmup_steps": 4,
    "history_window_size": 5,
    "collect_interval_steps": 2,
    "eval_interval_steps": 4,
    "eval_batches": 2,
    "log_interval_steps": 5,
    "save_interval_steps": 3,  # so that checkpoints fall between the rows, the snapshots and the evaluations
    "baseline": "static",
    "device": "cpu",
}

CLI = """
from aiether.cli import main
from aiether.training import samples
samples.NEW_TOKENS = 20  # as in kill_driver.py
raise SystemExit(main())
"""

Job = Callable[..., int]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kill")
    return {
        **SETTINGS,
        "dataset_path": str(write_corpus(folder / "words.txt")),
        "cache_dir": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def run_job(settings: dict[str, Any]) -> Job:
    """Trains, or resumes where a run is, in a process of its own; returns its exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aiether.training.run"])

    def run(run_dir: Path, kill: str = "nowhere", **changes: Any) -> int:
        job = {"settings": settings | changes, "run_dir": str(run_dir), "kill": kill}
        child = context.Process(
            target=runpy.run_path, args=(str(DRIVER), {"JOB": job}), kwargs={"run_name": "__kill_driver__"}
        )
        child.start()
        child.join(120)
        assert child.exitcode is not None, "the job hangs"
        return child.exitcode

    return run


@pytest.fixture(scope="module")
def whole(run_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_job(run_dir) == 0
    growths = [event["depth_after"] for event in read_rows(run_dir / "events.jsonl", "growth")]
    assert growths == [2, 4], "the job must grow twice, or the kills would not test growth"
    return run_dir


def read_rows(path: Path, *kinds: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row.get("kind", row.get("event")) in kinds]


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timings(entry) for key, entry in value.items() if key not in TIMINGS}
    return [without_timings(entry) for entry in value] if isinstance(value, list) else value


def assert_resumed_to_the_same(actual: Path, expected: Path) -> None:
    """Every weight, record and layer state is the same; only times and the note of a resume differ."""
    resumes = [row["step"] for path in actual.rglob("events.jsonl") for row in read_rows(path, "resume")]
    assert resumes, "it started over instead of resuming"
    assert min(resumes) > 0
    for arm in (".", "baseline-static"):
        for name, kinds in {"metrics.jsonl": ("train", "eval"), "events.jsonl": ("growth", "phase")}.items():
            rows = [without_timings(read_rows(run / arm / name, *kinds)) for run in (actual, expected)]
            assert rows[0] == rows[1], f"{arm}/{name}"
        for name in ("result.json", "lineage.json"):
            records = [
                without_timings(json.loads((run / arm / name).read_text())) for run in (actual, expected)
            ]
            assert records[0] == records[1], f"{arm}/{name}"
        for path in sorted((expected / arm).glob("layers/*/*.safetensors")):
            assert (actual / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
        final = Path(arm, "final", "model.safetensors")
        assert (actual / final).read_bytes() == (expected / final).read_bytes(), str(final)
    assert (actual / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    assert left_over(actual) == left_over(expected) == []


def left_over(run_dir: Path) -> list[Path]:
    """What was begun and not finished, and stays behind."""
    return sorted(path.relative_to(run_dir) for path in run_dir.rglob(".*"))


@pytest.mark.parametrize(
    "kills",
    [
        ("growth", "checkpoint-half-written"),
        (
            "checkpoint-not-renamed",
            "snapshot-half-written",
            "model-half-exported",
            "model-exported",
            "baseline-trained",
        ),
        ("random-1", "random-2"),
    ],
    ids=" ".join,
)
def test_killed_again_and_again(kills: tuple[str, ...], run_job: Job, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for kill in kills:
        assert run_job(run_dir, kill) == -signal.SIGKILL, kill
        assert not (run_dir / "summary.json").exists()
    assert run_job(run_dir) == 0
    assert_resumed_to_the_same(run_dir, whole)


def test_a_model_of_adaptive_depth_goes_on_with_its_thresholds_and_draws(
    run_job: Job, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "arch": "lahr",
        "n_layer": 2,
        "grow_to": [4],
        "lahr_router": "threshold",
        "lahr_capacity": 0.25,
        "lahr_iterations": 2,
        "lahr_memory_keys": 4,
        "lahr_memory_heads": 1,
        "lahr_memory_top_k": 2,
    }
    assert run_job(tmp_path / "whole", **changes) == 0
    assert len(read_rows(tmp_path / "whole" / "events.jsonl", "growth")) == 1
    for kill in ("checkpoint-half-written", "random-1"):
        assert run_job(tmp_path / "cut", kill, **changes) == -signal.SIGKILL
    assert run_job(tmp_path / "cut", **changes) == 0
    assert_resumed_to_the_same(tmp_path / "cut", tmp_path / "whole")


def test_a_budget_of_flops_that_was_planned_anew_is_kept_by_a_killed_run(
    run_job: Job, tmp_path: Path
) -> None:
    length: dict[str, Any] = {"max_steps": None, "max_flops": 2.2e8}
    assert run_job(tmp_path / "whole", **length) == 0
    replans = read_rows(tmp_path / "whole" / "events.jsonl", "replan")
    assert len(replans) == 2, "each growth makes a step dearer"
    assert run_job(tmp_path / "cut", "growth", **length) == -signal.SIGKILL
    assert run_job(tmp_path / "cut", **length) == 0
    assert_resumed_to_the_same(tmp_path / "cut", tmp_path / "whole")
    assert read_rows(tmp_path / "cut" / "events.jsonl", "replan") == replans


def test_ctrl_c_saves_where_it_stopped_and_says_how_to_go_on(
    settings: dict[str, Any], run_job: Job, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start_cli(settings, run_dir)
    wait_for_step(process, run_dir / "metrics.jsonl", 10)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"aiether train --resume {run_dir}" in " ".join(output.split())
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 10 <= summary["steps"] < STEPS
    assert list((run_dir / "checkpoints").glob(f"step-{summary['steps']:08d}-stage-*/COMPLETE.json"))
    assert run_job(run_dir) == 0
    assert_resumed_to_the_same(run_dir, whole)


def start_cli(settings: dict[str, Any], run_dir: Path) -> subprocess.Popen[str]:
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-c", CLI, "train", *flags, f"--output_dir={run_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"},
    )


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (metrics.exists() and re.search(rf'"step": {step},', metrics.read_text())):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
