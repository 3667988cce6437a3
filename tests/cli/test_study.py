"""`aiether study ...` as it is typed."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.study.fakes import FakeWorkers
from tests.study.test_runner import loss
from tests.study.test_spec import STUDY

from aiether.cli import main


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeWorkers]:
    """The workers that the command starts, which write records instead of training."""
    made: list[FakeWorkers] = []

    def make(workers: int, threads: int, gpus: list[str]) -> FakeWorkers:
        made.append(FakeWorkers(loss))
        return made[-1]

    monkeypatch.setattr("aiether.study.runner.LocalWorkers", make)
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder / "report.html")
    monkeypatch.setenv("COLUMNS", "160")
    return made


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of a small text" for number in range(4000)))
    content: dict[str, Any] = copy.deepcopy(STUDY) | {"lengths": [0.5, 0.7, 1.0]}
    content["base"] |= {"dataset_path": str(tmp_path / "text.txt"), "vocab_size": 300}
    content["base"]["cache_dir"] = str(tmp_path / "cache")
    content["presets"] = {"cpu": {"base": {"device": "cpu"}}, "other": {"seeds": 4}}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(content))  # sorted: grown comes first
    return path


def test_a_study_is_run_watched_reported_and_compared(
    fakes: list[FakeWorkers], study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = ["study", "run", str(study_file), "--preset", "cpu", "--output_dir", str(folder)]
    assert main([*arguments, "--set", "weight_decay=0.2"]) == 0
    said = capsys.readouterr().out
    assert "study: 12 runs" in said
    assert "[12/12] static seed 2: 3.5200 in 0 s" in said
    assert "grown seed 2: 3.4180" in said
    assert "grown against static: lower by 0.101" in said
    assert {order.settings["weight_decay"] for order in fakes[0].orders} == {0.2}
    assert fakes[0].orders[0].settings["device"] == "cpu"

    assert main(["study", "run", str(folder)]) == 0
    assert "12 of them there already" in capsys.readouterr().out
    assert main(["study", "status", str(folder)]) == 0
    status = capsys.readouterr().out
    assert "small: 12 finished" in status
    assert "static x0.5 seed 1" in status
    assert main(["study", "report", str(folder)]) == 0
    capsys.readouterr()

    run = folder / "cells" / "grown" / "1-seed0"
    (run / "result.json").write_text(
        '{"name": "grown", "eval_loss": 3.4, "bits_per_byte": null, "depth": 2, "tokens": 2560, '
        '"flops": 1000, "elapsed_s": 2.0}'
    )
    assert main(["study", "compare", str(folder), str(run), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| from | arm | loss")
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "grown",
        "static x0.5",
        "static x0.7",
        "static",
        "grown",
    ]


def test_a_stopped_study_says_how_to_go_on_where_it_ran(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the backend, what was told to go on as Slurm jobs would train on the host that submits them."""
    asked: list[tuple[Any, ...]] = []

    def jobs(*shape: Any) -> FakeWorkers:
        asked.append(shape)
        return FakeWorkers(loss, stop_at=5 if len(asked) == 1 else None)

    monkeypatch.setattr("aiether.study.slurm.SubmititJobs", jobs)
    monkeypatch.setattr("aiether.study.runner.LocalWorkers", None)
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder / "report.html")
    where = ["--backend", "slurm", "--slurm_partition", "a b", "--slurm_cpus", "3", "--workers", "2"]
    folder = tmp_path / "my study"
    assert main(["study", "run", str(study_file), "--output_dir", str(folder), *where]) == 130
    said = capsys.readouterr().out.splitlines()[-1]
    told, _, command = said.partition("go on with: ")
    assert told == "stopped and saved; "
    program, *arguments = shlex.split(command)
    assert program == "aiether"
    assert main(arguments) == 0
    assert len(asked) == 2
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage"),
        (["runn"], "unknown command 'runn'; did you mean 'run'?"),
        (["run"], "expected aiether study run STUDY"),
        (["run", "growth_vs_statik"], "did you mean 'growth_vs_static'?"),
        (["run", "nowhere/study.yaml"], "'nowhere/study.yaml' does not exist"),
        (["run", "growth_vs_static", "--preset", "cpuu"], "unknown preset 'cpuu'; did you mean 'cpu'?"),
        (["run", "growth_vs_static", "--preset", "cpu", "--set", "lr"], "NAME=VALUE is meant"),
        (["run", "growth_vs_static", "--preset", "cpu", "--set", "lrr=1"], "unknown setting 'lrr'"),
        (["run", "growth_vs_static", "--preset", "cpu", "--set", "seed=1"], "seed comes from seeds"),
        (["run", "growth_vs_static", "--preset", "cpu", "--set", "n_layer=2"], "would change nothing"),
        (["run", "growth_vs_static", "--preset", "gpu", "--set", "lr=0.1"], "tuning chooses it"),
        (["status", "nowhere"], "'nowhere' holds no study"),
        (["report", "nowhere"], "'nowhere' holds no study"),
        (["compare", "one"], "one folder is nothing to compare"),
        (["compare", "one", "two"], "'one' holds neither a study's results.json nor"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    said = capsys.readouterr()
    assert says in said.out + said.err
    assert len(said.err.splitlines()) <= 1
    assert not list(tmp_path.iterdir())
