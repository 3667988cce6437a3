"""Trackers hold what the run's own files hold, after a kill and a resume too, and never stop a run."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.training.corpus import write_corpus
from tests.training.fake_wandb import FakeWandb
from tests.training.tiny_run import TINY_RUN

from aiether.cli import main
from aiether.training import run as job
from aiether.training.config import TrainConfig, resolve
from aiether.training.recorder import Recorder
from aiether.training.tracking import TRACKERS, TrackedRun, Tracking, check_trackers
from aiether.training.tracking._rows import Entry, entry_of
from aiether.training.tracking._wandb_file import holds_its_end, records

pytestmark = pytest.mark.usefixtures("without_report")

STEPS, KILLED_AT = 12, 8
SETTINGS: dict[str, Any] = TINY_RUN | {
    "validation_fraction": 0.1,
    "max_steps": STEPS,
    "batch_size": 4,
    "lr_warmup_steps": 2,
    "growth_fractions": [0.4],
    "collect_interval_steps": 1,
    "eval_interval_steps": 4,
    "eval_batches": 2,
    "save_interval_steps": 6,
    "log_interval_steps": 1,
    "baseline": "static",
    "sample_prompt": "ab",
    "tracking_project": "tests",
}
SCALARS = {
    "train": {
        "train/loss": "loss",
        "train/grad_norm": "grad_norm",
        "train/learning_rate": "learning_rate",
        "train/tokens_per_s": "tokens_per_s",
    },
    "eval": {
        "eval/loss": "eval_loss",
        "eval/bits_per_byte": "bits_per_byte",
        "geometry/tau_normalised": "tau_normalised",
        "geometry/kappa": "kappa",
    },
}
BUDGET = {
    "budget/tokens": "tokens",
    "budget/flops": "flops",
    "budget/elapsed_s": "elapsed_s",
    "model/depth": "depth",
}
ARMS = {"grown": ".", "static": job.BASELINE}

# Trains with every tracker and is killed two steps after its last checkpoint, in the middle of everything.
DOOMED = """
import json, os, signal, sys
from aiether.training import samples
from aiether.training.config import resolve
from aiether.training.recorder import Recorder
from aiether.training.run import train
samples.NEW_TOKENS = 20
original = Recorder.on_log
def on_log(self, row):
    original(self, row)
    if row["step"] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.on_log = on_log
train(resolve("recommended", {}, json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every library without a network, and with its files away from the user's own."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(folder / "wandb"))
        yield folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"dataset_path": str(write_corpus(folder / "words.txt")), "cache_dir": str(folder / "cache")}


@pytest.fixture(scope="module")
def run_dir(environment: Path, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all installed trackers that was killed (SIGKILL) after a growth, and then resumed."""
    run_dir = tmp_path_factory.mktemp("runs") / "tracked"
    trackers = [name for name in TRACKERS if importlib.util.find_spec(name)]
    settings = SETTINGS | data | {"output_dir": str(run_dir), "report_to": trackers}
    command = [sys.executable, "-c", DOOMED, json.dumps(settings), str(KILLED_AT)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl") if row["kind"] == "train"][-1] == KILLED_AT
    assert job.resume(run_dir).status == "finished"
    resumed = [event["step"] for event in rows(run_dir / "events.jsonl") if event["event"] == "resume"]
    assert resumed == [6], "it must repeat steps, or the test shows nothing"
    return run_dir


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


Curves = dict[str, list[tuple[int, float]]]


def on_record(arm_dir: Path) -> Curves:
    """What the run's own files say, under the trackers' names."""
    curves: Curves = {}
    for row in rows(arm_dir / "metrics.jsonl"):
        for name, column in (SCALARS[row["kind"]] | BUDGET).items():
            if row[column] is not None:
                curves.setdefault(name, []).append((row["step"], row[column]))
    for name in BUDGET:  # a step that both trained and evaluated says it twice
        curves[name] = sorted(set(curves[name]))
    for event in rows(arm_dir / "events.jsonl"):
        if event["event"] == "growth":
            curves["growth/depth_after"] = [(event["step"], event["depth_after"])]
            curves["growth/loss_after"] = [(event["step"], event["loss_after"])]
    return curves


def assert_equal(actual: Mapping[str, Any], expected: Curves) -> None:
    for name, points in expected.items():
        assert [step for step, _ in actual[name]] == [step for step, _ in points], name
        values = [value for _, value in actual[name]]
        assert values == pytest.approx([value for _, value in points], rel=1e-6), name


@pytest.mark.parametrize("arm", ARMS)
def test_tensorboard_holds_the_records(run_dir: Path, arm: str) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard" / arm)).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    curves |= {name: sorted(set(curves[name])) for name in BUDGET}
    assert_equal(curves, on_record(run_dir / ARMS[arm]))
    texts = {tag for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")}
    assert texts == {"sample/text_summary"} | ({"growth/text_summary"} if arm == "grown" else set())
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"n_embd" in hparams
    assert b"environment.torch" in hparams


@pytest.mark.parametrize("arm", ARMS)
def test_wandb_holds_the_records_in_one_folder_to_sync(run_dir: Path, arm: str) -> None:
    pytest.importorskip("wandb")
    (path,) = run_dir.glob(f"wandb/offline-run-*-{arm}/run-*.wandb")
    curves: dict[str, list[tuple[int, Any]]] = {}
    config: dict[str, Any] = {}
    for record in wandb_records(path):
        if record.HasField("run"):
            assert (record.run.project, record.run.run_group) == ("tests", "tracked")
            assert record.run.display_name == ("tracked" if arm == "grown" else "tracked-static")
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            curves.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    assert_equal(curves, on_record(run_dir / ARMS[arm]))
    assert ("growth" in curves) == (arm == "grown")
    assert config["n_embd"] == 16
    assert "environment.torch" in config


def wandb_records(path: Path) -> Iterator[Any]:
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    yield from map(wandb_internal_pb2.Record.FromString, records(path))


@pytest.mark.parametrize("arm", ARMS)
def test_trackio_holds_the_records(run_dir: Path, arm: str) -> None:
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    name = "tracked" if arm == "grown" else "tracked-static"
    (run,) = [run for run in trackio.Api().runs("tests") if run.name == name]
    assert run.config["_Group"] == "tracked"
    assert run.config["n_embd"] == 16
    curves: dict[str, list[tuple[int, Any]]] = {}
    for row in storage.get_logs("tests", name, run_id=run.id):
        for key, value in row.items():
            curves.setdefault(key, []).append((row["step"], value))
    curves |= {name: sorted(set(curves[name])) for name in BUDGET}
    assert_equal(curves, on_record(run_dir / ARMS[arm]))
    assert ("growth" in curves) == (arm == "grown")


# --- what cannot be used is refused, and what fails later is left -------------------------------------


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_refused_before_any_work(
    name: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    assert main(["train", f"--output_dir={tmp_path / 'run'}", "--report_to", name]) == 2
    assert f"report_to names {name}, which is not installed: pip install 'aiether[{name}]'" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_refused_before_any_work(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_CONFIG_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # it reads its settings once a process
    try:
        with pytest.raises(ValueError, match=r"W&B has no login here .* or set WANDB_MODE=offline"):
            check_trackers(["wandb"])
    finally:
        wandb.teardown()


def test_a_remote_trackio_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/somewhere")
    with pytest.raises(ValueError, match="TRACKIO_SPACE_ID is set: aiether logs to the local trackio only"):
        check_trackers(["trackio"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": ["mlflow"]}, "report_to is .*'mlflow'.*tensorboard, wandb, trackio"),
        ({"report_to": ["none", "wandb"]}, "none cannot stand beside a tracker"),
        ({"report_to": ["wandb", "wandb"]}, "name each tracker once"),
        ({"tracking_project": "../elsewhere"}, "tracking_project is '../elsewhere'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("recommended", {}, settings)


def test_a_tracker_that_cannot_open_costs_the_run_one_warning(
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    run_dir = tmp_path / "run"
    honest = job.windows

    def windows(*arguments: Any, **settings: Any) -> Any:
        (run_dir / "tensorboard").write_text("a file where the folder should be")
        return honest(*arguments, **settings)

    monkeypatch.setattr(job, "windows", windows)  # once the folder is known to be free, before it is used
    result = job.train(_settings(data, run_dir, report_to=["tensorboard"], baseline="none", max_steps=2))
    assert result.status == "finished"
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("warning: tracking with tensorboard has stopped") == 1


def _settings(data: dict[str, str], run_dir: Path, **more: Any) -> TrainConfig:
    return resolve("recommended", {}, SETTINGS | data | {"output_dir": str(run_dir)} | more)


@dataclass
class Memory:
    """A tracker that keeps what it is told until its disk is full."""

    first_step: int = 0
    room: int = 1000
    where: str = "in memory"

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []
        self.closed: bool | None = None

    def log(self, entry: Entry) -> None:
        if len(self.entries) == self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.entries.append(entry)

    def close(self, *, failed: bool) -> None:
        self.closed = failed


def tracked(tmp_path: Path) -> TrackedRun:
    return TrackedRun(
        id="x", project="p", group="g", name="n", arm="grown", run_dir=tmp_path, arm_dir=tmp_path, settings={}
    )


def test_a_tracker_that_fails_in_mid_run_is_left_and_the_others_go_on(tmp_path: Path) -> None:
    full, whole = Memory(room=2), Memory()
    said: list[str] = []
    openers = {"full": lambda run: full, "whole": lambda run: whole}
    with Tracking(tracked(tmp_path), openers, said.append) as tracking:
        for kind in ("train", "stage"):  # rows before the first stage lie in the records
            tracking.observe(kind, {"step": 0, "loss": 9.0})
        for step in range(1, 6):
            tracking.observe("train", {"step": step, "loss": 1.0 / step})
    assert [entry.step for entry in whole.entries] == [1, 2, 3, 4, 5]
    assert whole.closed is False
    assert len(full.entries) == 2
    assert said[:2] == ["tracking with full: in memory", "tracking with whole: in memory"]
    (warning,) = said[2:]
    assert "tracking with full has stopped (OSError: [Errno 28] No space left on device)" in warning
    assert "metrics.jsonl has every row" in warning


def test_a_tracker_is_given_the_records_from_where_it_stands(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    lines.insert(1, {"kind": "missing", "step": 1})  # a gap, which no tracker is told
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"kind": "missing", "step": 1}) + "\n")
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"event": "growth", "step": 2, "depth_after": 4}) + "\n"
    )
    fresh, ahead = Memory(), Memory(first_step=3)
    with Tracking(tracked(tmp_path), {"a": lambda _: fresh, "b": lambda _: ahead}, print) as tracking:
        for stage in (0, 1):
            tracking.observe("stage", {"stage": stage})
    assert [(entry.step, sorted(entry.values)) for entry in fresh.entries] == [
        (1, ["train/loss"]),
        (2, ["train/loss"]),
        (2, ["growth/depth_after", "growth/step"]),
        (3, ["train/loss"]),
    ]
    assert [entry.step for entry in ahead.entries] == [3]


def test_records_that_go_back_in_mid_run_open_the_trackers_anew(tmp_path: Path) -> None:
    opened: list[Memory] = []

    def opener(run: TrackedRun) -> Memory:
        opened.append(Memory())
        return opened[-1]

    with Tracking(tracked(tmp_path), {"memory": opener}, print) as tracking:
        tracking.observe("stage", {})
        tracking.observe("train", {"step": 1, "loss": 1.0})
        tracking.observe("train", {"step": 2, "loss": float("nan")})
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n")
        tracking.observe("resume", {"step": 1})
        tracking.observe("stage", {})
        tracking.observe("train", {"step": 2, "loss": 0.5})
    assert [memory.closed for memory in opened] == [False, False]
    assert [entry.values["train/loss"] for entry in opened[1].entries] == [1.0, 0.5]


# --- faults of the libraries themselves ---------------------------------------------------------------


def feed(tracking: Tracking, steps: range) -> None:
    for step in steps:
        tracking.observe("train", {"step": step, "loss": 1.0 / step})
        tracking.observe("eval", {"step": step, "eval_loss": 1.0 / step})


def the_warning(said: list[str], name: str) -> str:
    (warning,) = [text for text in said if text.startswith("warning: ")]
    assert warning.startswith(f"warning: tracking with {name} has stopped (")
    assert warning.endswith("metrics.jsonl has every row")
    assert "\n" not in warning
    return warning


def test_a_run_outlives_trackers_whose_files_go_in_the_middle(
    environment: Path, data: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "trackio"):
        pytest.importorskip(name)
    run_dir, (database,) = tmp_path / "run", (environment / "trackio",)
    original = Recorder.on_step

    def on_step(self: Recorder, step: int, train_seconds: float) -> None:
        original(self, step, train_seconds)
        if step == 5:
            shutil.rmtree(run_dir / "tensorboard")
            deadline = time.monotonic() + 10
            while not list(database.glob("faults.db")) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1.5)  # trackio's thread writes twice a second: some rows are there
            for path in database.glob("faults.db*"):
                path.write_bytes(b"no database" * 100)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trackio's own, from its thread; and TensorBoard's thread that ends
        patch.setattr(Recorder, "on_step", on_step)
        patch.setattr(threading, "excepthook", lambda _: None)
        trackers = ["tensorboard", "trackio"]
        more = {"report_to": trackers, "baseline": "none", "tracking_project": "faults"}
        assert job.train(_settings(data, run_dir, **more)).status == "finished"
    trained = [row["step"] for row in rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    said = " ".join(capfd.readouterr().out.split())
    for name in trackers:
        assert said.count(f"warning: tracking with {name} has stopped (") == 1


def test_trackio_that_kept_fewer_rows_is_told(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder)
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", folder)
    said: list[str] = []
    with Tracking(tracked(tmp_path), {"trackio": TRACKERS["trackio"]}, said.append) as tracking:
        tracking.observe("stage", {})
        feed(tracking, range(1, 4))
        deadline = time.monotonic() + 10
        while not (found := list(folder.glob("*.db"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.5)  # its thread writes twice a second
        assert found
        shutil.rmtree(folder)
        feed(tracking, range(4, 6))
    assert "(OSError: it holds 4 of 10 rows)" in the_warning(said, "trackio")


def test_wandb_whose_process_dies_is_left_and_the_next_arm_has_it_again(
    environment: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    said: list[str] = []
    with Tracking(tracked(tmp_path), {"wandb": TRACKERS["wandb"]}, said.append) as tracking:
        tracking.observe("stage", {})
        feed(tracking, range(1, 4))
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith("wandb"):
                child.kill()
        feed(tracking, range(4, 40))
    the_warning(said, "wandb")
    said.clear()
    arm_dir = tmp_path / "static"
    arm_dir.mkdir()
    with Tracking(tracked(arm_dir), {"wandb": TRACKERS["wandb"]}, said.append) as tracking:
        tracking.observe("stage", {})
        feed(tracking, range(1, 4))
    assert [text for text in said if text.startswith("warning")] == []
    (path,) = arm_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert holds_its_end(path, within_s=0.0)
    path.write_bytes(path.read_bytes()[:-1])  # as a full disk leaves it
    assert not holds_its_end(path, within_s=0.0)
    path.write_bytes(path.read_bytes()[:7])
    assert not holds_its_end(path, within_s=0.0)


@pytest.mark.parametrize("network", ["whole", "gone"])
def test_wandb_on_line_gets_the_rows_or_is_left_after_a_while(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    wandb = pytest.importorskip("wandb")
    said: list[str] = []
    with FakeWandb() as server:
        wandb.teardown()  # it reads its settings once a process
        settings = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("aiether.training.tracking._wandb.FINISH_TIMEOUT_S", 2.0)
        try:
            with Tracking(tracked(tmp_path), {"wandb": TRACKERS["wandb"]}, said.append) as tracking:
                tracking.observe("stage", {})
                feed(tracking, range(1, 4))
                if network == "gone":
                    server.go_away()
                feed(tracking, range(4, 6))
        finally:
            wandb.teardown()
    if network == "gone":
        assert "(TimeoutError: not all rows got through; later, `wandb sync " in the_warning(said, "wandb")
    else:
        assert [text for text in said if text.startswith("warning")] == []
        assert {row["_step"]: row["train/loss"] for row in server.history} == {
            step: 1.0 / step for step in range(1, 6)
        }


def test_a_damaged_record_costs_a_tracker_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "st\n')
    said: list[str] = []
    with Tracking(tracked(tmp_path), {"memory": lambda _: Memory()}, said.append) as tracking:
        tracking.observe("stage", {})
        tracking.observe("train", {"step": 2, "loss": 0.5})
    the_warning(said, "memory")


def test_a_run_that_fails_closes_its_trackers_as_failed(tmp_path: Path) -> None:
    memory = Memory()

    def fail() -> None:
        with Tracking(tracked(tmp_path), {"memory": lambda _: memory}, print) as tracking:
            tracking.observe("stage", {})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert memory.closed is True


def test_what_was_not_measured_is_left_out_and_a_loss_that_is_no_number_is_not() -> None:
    entry = entry_of("eval", {"kind": "eval", "step": 3, "eval_loss": float("nan"), "tau": None, "rho": 0.5})
    assert entry is not None
    assert entry.values.keys() == {"eval/loss", "geometry/rho"}
    assert entry_of("step", {"step": 3}) is None
