"""Faults of a whole run: what it ends with, what is left, and that it goes on to where it would have come."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.training.corpus import write_corpus
from tests.training.tiny_run import TINY_RUN, as_flags

from aiether.cli import main
from aiether.integrations import _lock
from aiether.training import recorder
from aiether.training import run as job
from aiether.training.recorder import JsonLines, Recorder
from aiether.training.report._facts import gaps
from aiether.training.report.run_records import load_run

SETTINGS: dict[str, Any] = TINY_RUN | {
    "validation_fraction": 0.1,
    "max_steps": 16,
    "batch_size": 4,
    "lr_warmup_steps": 2,
    "collect_interval_steps": 2,
    "eval_interval_steps": 4,
    "eval_batches": 2,
    "log_interval_steps": 1,
    "save_interval_steps": 3,
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"dataset_path": str(write_corpus(folder / "words.txt")), "cache_dir": str(folder / "cache")}


Train = Callable[..., int]


@pytest.fixture(scope="module")
def train(data: dict[str, str], without_report: None) -> Train:
    """`aiether train` with a small job's settings and without its report; returns the exit status."""

    def command(run_dir: Path | None, **settings: Any) -> int:
        given = {**SETTINGS, **data, **settings} | ({"output_dir": run_dir} if run_dir else {})
        return main(["train", *as_flags(given)])

    return command


def go_on(run_dir: Path, *flags: str) -> int:
    return main(["train", "--resume", str(run_dir), *flags])


def rows(path: Path) -> list[dict[str, Any]]:
    timings = {"elapsed_s", "eval_seconds", "eval_steps_per_s", "steps_per_s", "tokens_per_s", "seconds"}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timings} for row in found]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final" / "model.safetensors").read_bytes()


def assert_same_end(actual: Path, expected: Path) -> None:
    assert weights(actual) == weights(expected)
    assert rows(actual / "metrics.jsonl") == rows(expected / "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(run_dir) == 0
    return run_dir


@contextmanager
def at_step(step: int, action: Callable[[], None], arm: str = "") -> Iterator[None]:
    """Do something after a step of an arm, where the run records it."""
    original = Recorder.on_step

    at = step

    def on_step(self: Recorder, step: int, train_seconds: float) -> None:
        original(self, step, train_seconds)
        if step == at and self.run_dir.name.startswith(arm):
            action()

    Recorder.on_step = on_step
    try:
        yield
    finally:
        Recorder.on_step = original


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(Exception):
    """What nothing expects: the process ends without saving."""


def crash() -> None:
    raise Crash


# -- signals --------------------------------------------------------------------------------------------


def test_sigterm_while_data_are_prepared_keeps_what_was_read_and_no_half_of_a_result(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = job.prepare

    def prepare(config: Any, progress: Any) -> Any:
        def told(what: str, fraction: float) -> None:
            if what == "tokenising":
                terminate()
            progress(what, fraction)

        return honest(config, told)

    with monkeypatch.context() as patch:
        patch.setattr(job, "prepare", prepare)
        assert train(tmp_path / "run", cache_dir=tmp_path / "cache") == 143
    assert "SIGTERM; nothing was trained yet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    kept = tmp_path / "cache" / "data"
    assert {path.suffix for path in kept.iterdir()} == {".lock", ".part"}
    assert train(tmp_path / "run", cache_dir=tmp_path / "cache", max_steps=4, trigger="never") == 0
    assert {path.suffix for path in kept.iterdir()} == {".lock", ""}


def test_sigterm_in_the_baseline_saves_it_and_tells_the_scheduler(
    train: Train, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with at_step(5, terminate, arm="baseline"):
        assert train(run_dir, baseline="static") == 143
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert [arm["signal"] for arm in (summary, *summary["baselines"])] == [None, "SIGTERM"]
    assert summary["baselines"][0]["steps"] == 5
    assert go_on(run_dir) == 0
    assert_same_end(run_dir, whole)
    baseline = rows(run_dir / "baseline-static" / "metrics.jsonl")
    steps = [row["step"] for row in baseline if row["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))
    assert len(steps) > 5


# -- two processes --------------------------------------------------------------------------------------


def test_a_second_process_on_the_folder_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = "import runpy, sys, pathlib, time\nhold = runpy.run_path(sys.argv[1])['hold']"
    code = f"{load}\nwith hold(pathlib.Path(sys.argv[2])):\n    print(flush=True)\n    time.sleep(60)"
    run_dir = tmp_path / "run"
    with at_step(5, terminate):
        assert train(run_dir) == 143
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", code, str(_lock.__file__), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for again in (lambda: train(run_dir), lambda: go_on(run_dir)):
            capsys.readouterr()
            assert again() == 2
            assert f"in use by process {process.pid} on host {os.uname().nodename}" in capsys.readouterr().err
        process.kill()
    (run_dir / "run.lock").unlink()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert go_on(run_dir) == 0


def test_two_runs_that_start_in_one_second_get_two_folders(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(job.datetime):  # a clock that stands still
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2030, 1, 1, tzinfo=tz)

    letters = iter(["aaa", "aaa", "bbb"])
    monkeypatch.setattr(job, "datetime", Stopped)
    monkeypatch.setattr(job.random.Random, "choices", lambda self, *args, **kwargs: list(next(letters)))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train(None, trigger="never", max_steps=2) == 0
    assert sorted(path.name[-3:] for path in (tmp_path / "runs").iterdir()) == ["aaa", "bbb"]


# -- full disks -----------------------------------------------------------------------------------------


def test_rows_wait_for_room_and_no_half_line_stays(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        for step in (2, 3):
            lines.append({"step": step})
        assert lines.path.read_text() == '{"step": 1}\n'
        assert len(lines.unwritten) == 2
        assert lines.size() == 12
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.append({"step": 4})
    assert [row["step"] for row in rows(lines.path)] == [1, 2, 3, 4]
    lines.truncate(12, ['{"step": 9}'])
    assert [row["step"] for row in rows(lines.path)] == [1, 9]
    lines.close()


@pytest.mark.parametrize("left", [0, 5, 12, 30, 59])
def test_a_row_stands_where_rows_are_missing_and_the_length_stays(tmp_path: Path, left: int) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        lines.append({"step": step})
    size = lines.size()
    os.truncate(lines.path, left)
    kept = min(left // 12, 2)  # the row of a gap is longer than two of these rows
    assert lines.truncate(size) == kept
    marked = [*({"step": step} for step in range(1, kept + 1)), {"kind": "missing", "step": kept}]
    for _ in range(2):
        assert rows(lines.path) == marked
        assert lines.size() == lines.path.stat().st_size == size
        lines.append({"step": 6})
        assert lines.truncate(size) is None
    lines.close()


def test_a_record_that_was_edited_is_cut_at_a_line(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        lines.append({"step": step})
    size = lines.size()
    lines.path.write_text(lines.path.read_text().replace('{"step": 2}', '{"step": 2, "more": 1}'))
    assert lines.truncate(size) == 3
    assert rows(lines.path)[-2:] == [{"step": 3}, {"kind": "missing", "step": 3}]
    lines.close()


def test_a_full_device_under_the_records(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    error = lines.flush()
    assert error is not None
    assert "No space left" in str(error)
    assert (lines.size(), lines.unwritten) == (0, ['{"step": 1}'])
    lines.close()


def test_a_run_whose_records_find_no_room_trains_on_and_loses_no_row(
    train: Train, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows travel in the checkpoints until there is room."""
    run_dir, honest = tmp_path / "run", JsonLines.flush

    def to_full_device(self: JsonLines) -> OSError | None:
        if self.path.name != "metrics.jsonl" or self.size() < 900:
            return honest(self)
        with open("/dev/full", "ab", buffering=0) as full:
            self._file, own = full, self._file
            try:
                return honest(self)
            finally:
                self._file = own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.JsonLines, "flush", to_full_device)
        assert train(run_dir) == 3
    said = capsys.readouterr()
    assert said.out.count("warning: the disk is full: rows of metrics.jsonl wait in memory") == 1
    assert said.err.count("\n") == 1
    assert "metrics.jsonl could not be written (No space left on device" in said.err
    assert f"go on with: aiether train --resume {run_dir}" in said.err
    assert 0 < len(rows(run_dir / "metrics.jsonl")) < 8
    assert go_on(run_dir) == 0
    assert_same_end(run_dir, whole)


def test_a_full_disk_at_a_checkpoint_ends_in_one_line(
    train: Train, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with at_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))):
            assert train(run_dir) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("aiether train: the checkpoint of step 6 could not be written (")
    assert said.endswith(f"go on with: aiether train --resume {run_dir}\n")
    assert not list(run_dir.rglob(".*"))
    assert go_on(run_dir) == 0
    assert_same_end(run_dir, whole)


def test_a_full_disk_under_the_cache_names_it(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        assert train(tmp_path / "run", cache_dir=tmp_path / "cache") == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the prepared data (cache_dir) could not be written (" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- numbers that are none, damage, memory ---------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_status_3_and_can_be_skipped_on_resuming(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, lr=1e3, weight_decay=1e3, optimizer="adamw") == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    met = re.search(r"step (\d): the loss or the gradient norm is not finite; nothing of it was saved", said)
    assert met is not None, said
    step = int(met[1])  # 3 or 4, by the processor's rounding
    assert go_on(run_dir, "--on_nan", "skip", "--max_skipped_steps", "1") == 3
    said = capsys.readouterr()
    before = step - 1 - (step - 1) % 3
    assert f"step {step}: the loss or the gradient norm is not finite; back to step {before}" in said.out
    assert "with 1 of at most 1 steps skipped already" in said.err
    assert [row["step"] for row in rows(run_dir / "events.jsonl") if row["event"] == "skip"] == [step]
    assert "on_nan: skip" in (run_dir / "config.yaml").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    train: Train, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with at_step(7, terminate):
        assert train(run_dir) == 143
    newest = max((run_dir / "checkpoints").iterdir())
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    assert go_on(run_dir) == 0
    said = capsys.readouterr().out
    assert f"warning: checkpoint {newest.name} is damaged (model.safetensors is not as it was" in said
    assert "resumed at step 6 with 1 layers" in said
    assert_same_end(run_dir, whole)


def test_a_record_that_was_cut_is_named_on_resuming_and_in_the_report(
    train: Train, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed twice from one checkpoint: what the first process wrote beyond it must not stay."""
    run_dir = tmp_path / "run"
    with at_step(10, terminate):
        assert train(run_dir) == 143
    cuts = {"metrics.jsonl": 6, "events.jsonl": 0}  # whole lines that stay, and a half one
    for name, lines in cuts.items():
        content = (run_dir / name).read_bytes().splitlines(keepends=True)
        (run_dir / name).write_bytes(b"".join(content[:lines]) + content[lines][:9])
    with at_step(11, crash), pytest.raises(Crash):
        go_on(run_dir)
    said = " ".join(capsys.readouterr().out.split())
    complete = rows(whole / "metrics.jsonl")
    after = complete[5]["step"]
    for name, step in (("metrics.jsonl", after), ("events.jsonl", 0)):
        told = f"{run_dir / name} was cut or edited since the checkpoint of step 10: rows after step {step} "
        assert said.count(f"warning: {told}are missing; the training goes on") == 1
    assert go_on(run_dir) == 0
    assert "was cut" not in capsys.readouterr().out
    gap = {"kind": "missing", "step": after}
    beyond = [row for row in complete if row["step"] > 10]
    assert rows(run_dir / "metrics.jsonl") == [*complete[:6], gap, *beyond]
    assert weights(run_dir) == weights(whole)
    assert load_run(run_dir).gaps == (("metrics.jsonl", after), ("events.jsonl", 0))
    assert f"rows after step {after} are missing" in (run_dir / "final" / "README.md").read_text()
    assert gaps(load_run(whole)) == ()


def test_a_run_goes_on_with_smaller_batches_and_the_same_tokens_a_step(
    train: Train, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with at_step(7, terminate):
        assert train(run_dir) == 143
    assert go_on(run_dir, "--batch_size", "2") == 2
    assert "keep their product at 4" in capsys.readouterr().err
    assert go_on(run_dir, "--batch_size", "2", "--gradient_accumulation_steps=2") == 0
    both = [rows(folder / "metrics.jsonl") for folder in (run_dir, whole)]
    assert [row["step"] for row in both[0]] == [row["step"] for row in both[1]]
    for one, other in zip(*both, strict=True):
        name = "eval_loss" if one["kind"] == "eval" else "loss"
        assert one[name] == pytest.approx(other[name], rel=1e-4)
        assert one["tokens"] == other["tokens"]


def test_a_final_depth_that_cannot_fit_is_refused_before_the_run(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", max_layers=10_000, n_embd=2048) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the largest planned depth, 10000 layers, needs at least" in said
    assert not (tmp_path / "run").exists()


# -- clocks ---------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(
    train: Train, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days back and forth at every reading, for the Trainer too; and files from the future."""
    true_time, jumps = time.time, iter(range(10**9))
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: true_time() + (-1) ** next(jumps) * 86_400.0)
        with at_step(7, terminate):
            assert train(run_dir) == 143
        for path in run_dir.rglob("*"):
            os.utime(path, (4e9, 4e9))
        assert go_on(run_dir) == 0
    assert next(jumps) > 10, "nothing read the clock, so this shows nothing"
    assert_same_end(run_dir, whole)
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    elapsed = [row["elapsed_s"] for row in written]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[-1] < 3_600
    assert [row["step"] for row in written] == sorted(row["step"] for row in written)
    assert all(row["eval_seconds"] > 0 < row["eval_steps_per_s"] for row in written if row["kind"] == "eval")
    assert all(row["steps_per_s"] > 0 for row in written if row["kind"] == "train")
