"""Runs as jobs of submitit: by its executor for this machine, and with Slurm's commands played by scripts."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.study.fakes import Silent
from tests.study.test_workers import content

from aiether.cli.study import RunFlags, backend
from aiether.integrations import CheckpointStore, hold
from aiether.study.arms import Cell, cell_config
from aiether.study.check import check_spec
from aiether.study.job import run_order
from aiether.study.jobs import FOLDER, NotedJob, end_left_jobs, note
from aiether.study.pool import Order
from aiether.study.results import read_rows
from aiether.study.runner import run_study, worker_shape
from aiether.study.slurm import SubmititJobs
from aiether.study.spec import spec_from

__all__ = ["content"]  # the fixture


def one(content: dict[str, Any], **base: Any) -> dict[str, Any]:
    changed = {**content["base"], **base}
    return {**content, "base": changed, "conditions": {"one": content["conditions"]["one"]}}


def order_of(content: dict[str, Any], folder: Path) -> Order:
    settings = asdict(cell_config(spec_from(content), Cell("one", 1.0, 0)))
    return Order(folder, settings, keep_models=False)


def jobs_of(folder: Path, cluster: str) -> SubmititJobs:
    """`local`: processes of their own; `debug`: in this process."""
    return SubmititJobs(folder, cluster, 1, 1, {"timeout_min": 5})


def wait_for_training(run: Path) -> None:
    while not any(row["kind"] == "eval" for row in read_rows(run / "metrics.jsonl")):
        time.sleep(0.01)


@pytest.fixture
def same_signals() -> Iterator[None]:
    """A job's process is its own; here it is ours."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_jobs_that_were_left_are_ended_and_the_study_goes_on_from_what_they_saved(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_signals: None
) -> None:
    """Two jobs are processes of their own; the last one, which ends as it should, is a job here."""
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder)
    content = one(content, eval_interval_steps=40, save_interval_steps=40) | {"budget": {"steps": 1600}}
    run, jobs = tmp_path / "cells" / "one" / "1-seed0", tmp_path / FOLDER
    (tmp_path / "study.yaml").write_text(json.dumps(content))
    left = jobs_of(jobs, "local")
    left.submit(order_of(content, run))
    wait_for_training(run)
    end_left_jobs(jobs, print)
    assert not (run / "run.lock").exists()
    saved = CheckpointStore(run).latest()
    assert saved is not None

    assert left.wait(0.1) == []  # it got further: submitted once more, and nobody needs to know
    while not (run / "run.lock").exists():  # before, while it starts, submitit lets SIGTERM pass by
        time.sleep(0.01)
    observer = Silent()
    spec = spec_from(content)
    result = run_study(spec, tmp_path, observer, backend=lambda threads: jobs_of(jobs, "debug"), threads=1)
    assert result.exit_status == 0, result.failures
    assert "ending 1 job(s) of an earlier call" in observer.messages[0]
    assert not any("reason" in row for row in read_rows(tmp_path / "attempts.jsonl"))
    assert len(list(jobs.glob("*_submitted.pkl"))) == 2
    assert len(list(jobs.glob("DEBUG_*.out"))) == 1
    assert f"resumed at step {saved.step} " in Path(f"{run}.log").read_text()
    assert json.loads((jobs / "jobs.json").read_text()) == {}
    (arm,) = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert [growth["depth_after"] for growth in arm["cells"][0]["growths"]] == [2]


def test_a_run_that_fails_in_training_says_why_and_where_its_log_is(
    content: dict[str, Any], tmp_path: Path, same_signals: None
) -> None:
    (tmp_path / "jobs").mkdir()
    jobs = jobs_of(tmp_path / "jobs", "debug")
    jobs.submit(order_of(one(content, lr=1000.0), tmp_path / "run"))
    ((_, outcome),) = jobs.wait(1.0)
    assert outcome.status == "failed"
    assert outcome.reason is not None
    assert "is not finite" in outcome.reason
    assert outcome.reason.endswith(f"its log: {tmp_path / 'run.log'}")
    assert "not finite" in (tmp_path / "run.log").read_text()


def test_a_run_saves_when_its_job_s_time_is_nearly_over(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_signals: None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    order, word = order_of(one(content, device="cpu"), tmp_path / "run"), tmp_path / "word.json"
    order = Order(order.folder, {**order.settings, "max_steps": 200}, keep_models=False)

    def warn() -> None:
        wait_for_training(order.folder)
        os.kill(os.getpid(), signal.SIGUSR2)

    warning = threading.Thread(target=warn)
    warning.start()
    run_order(str(order.folder), order.settings, order.keep_models, 3, str(word))
    warning.join()
    assert json.loads(word.read_text()) == {"status": "interrupted", "reason": None, "further": True}
    saved = CheckpointStore(order.folder).latest()
    assert saved is not None
    assert "interrupted: evaluation loss" in (tmp_path / "run.log").read_text()
    assert os.environ["OMP_NUM_THREADS"] == "3"


COMMANDS = {
    "sbatch": 'cp "$1" "$PLAYED/job.sh"; echo "Submitted batch job 7"',
    "scancel": 'echo "$@" > "$PLAYED/cancelled"',
    "sacct": "printf 'JobID|State|NodeList\\n7|CANCELLED by 0|here\\n'",
    "srun": "exit 1",
}


def test_a_slurm_job_gets_what_was_asked_for_and_is_cancelled_when_its_runner_was_killed(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, line in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{line}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PLAYED", str(tmp_path))
    flags = RunFlags("small", backend="slurm", slurm_cpus=5, slurm_timeout_min=7, slurm_partition="short")
    content = one(content)
    make = backend(flags, spec_from(content), tmp_path)
    assert make is not None
    place = make(5)
    assert place.slots == 64
    place.submit(order_of(content, tmp_path / "run"))
    asked = (tmp_path / "job.sh").read_text()
    for words in ("cpus-per-task=5", "gpus-per-node=1", "time=7", "partition=short", "no-requeue"):
        assert f"#SBATCH --{words}\n" in asked
    end_left_jobs(tmp_path / FOLDER, print)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    ((_, outcome),) = place.wait(5)
    assert outcome.reason is not None
    assert outcome.reason.startswith("job 7 ended as CANCELLED")


def test_a_folder_that_a_left_job_does_not_free_is_not_given_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.study.jobs.SAVE_S", 0.1)
    run = tmp_path / "run"
    note(tmp_path, [NotedJob(str(run), "local", str(os.getpid()))])  # an id that another process has now
    held, done = threading.Event(), threading.Event()

    def keep() -> None:
        with hold(run):
            held.set()
            done.wait()

    holder = threading.Thread(target=keep)
    holder.start()
    held.wait()
    try:
        with pytest.raises(ValueError, match="still works on"):
            end_left_jobs(tmp_path, print)
    finally:
        done.set()
        holder.join()
    end_left_jobs(tmp_path, print)


def test_jobs_elsewhere_are_not_measured_by_this_machine(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_from(one(content, device="auto"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert worker_shape(tmp_path, check_spec(spec), 8, 6) == (8, 6)
    assert worker_shape(tmp_path, check_spec(spec), None, 2) == (1, 6)  # as the folder's first runs had
    with pytest.raises(ValueError, match=r"workers is 8, and there are 1 GPU"):
        worker_shape(tmp_path, check_spec(spec), 8)
    with pytest.raises(ValueError, match="hides this machine's GPUs"):
        backend(RunFlags("small", backend="submitit-local"), spec, tmp_path)


def test_submitit_s_own_processes_are_one_at_a_time(content: dict[str, Any], tmp_path: Path) -> None:
    make = backend(RunFlags("small", backend="submitit-local"), spec_from(one(content)), tmp_path)
    assert make is not None
    assert make(1).slots == 1
