"""A folder that a run may not begin in, and a run that may not go on as it is told to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.training.corpus import write_corpus
from tests.training.tiny_run import TINY_RUN, as_flags

from aiether.cli import main
from aiether.training.run_folder import CONTENTS, check_output_dir

TINY = as_flags(TINY_RUN | {"max_steps": 4, "batch_size": 2, "eval_batches": 1, "validation_fraction": 0.2})
TINY += ["--eval_interval_steps", "2", "--save_interval_steps", "2", "--baseline", "static"]
Tell = Callable[..., str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = ["--dataset_path", str(write_corpus(folder / "words.txt")), "--cache_dir", str(folder / "cache")]
    assert main(["train", *TINY, *data, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """The run as a kill before its end leaves it."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("result.json", "summary.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    def run(*arguments: str, status: int = 2) -> str:
        assert main(arguments) == status
        said = capsys.readouterr().err
        assert said.count("\n") == (1 if status else 0)
        return said

    return run


def edit(run_dir: Path, **settings: Any) -> None:
    path = run_dir / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


def test_a_new_run_replaces_nothing(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run already; go on with --resume"):
        check_output_dir(finished)
    (tmp_path / "notes.txt").write_text("mine")
    check_output_dir(tmp_path)
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match="holds final already, which a run would replace"):
        check_output_dir(tmp_path)


def test_every_file_of_a_run_is_among_those_that_are_not_replaced(finished: Path) -> None:
    written = {path.name for path in finished.iterdir()} - {"environment.json"}
    assert written <= CONTENTS, "add the new ones to CONTENTS"


def test_resume_names_a_changed_flag_and_both_values(run_dir: Path, tell: Tell) -> None:
    said = tell("train", "--resume", str(run_dir), "--lr", "1e-3", "--max_steps", "4", "--seed", "9")
    assert "lr is 0.002 in the run, 0.001 here; seed is 0 in the run, 9 here; remove --lr, --seed" in said
    assert "max_steps" not in said


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 1e-3}, "lr was 0.002 and is now 0.001"),
        ({"max_steps": 9, "seed": 3}, "max_steps was 4 and is now 9; seed was 0 and is now 3"),
        ({"n_embd": 32}, "n_embd was 16 and is now 32"),
        ({"optimizer": "adamw"}, "optimizer was 'muon' and is now 'adamw'"),
        ({"grow_to": [2]}, "grow_to was [] and is now [2]"),
        ({"batch_size": 4}, "batch_size * gradient_accumulation_steps was 2 and is now 4"),
        ({"eval_batches": 2}, "batch_size * eval_batches was 2 and is now 4"),
        ({"bogus": 1}, "unknown setting 'bogus'"),
    ],
)
def test_resume_names_what_was_edited_by_hand(
    run_dir: Path, tell: Tell, change: dict[str, Any], told: str
) -> None:
    edit(run_dir, **change)
    said = tell("train", "--resume", str(run_dir))
    assert told in said
    assert str(run_dir / "config.yaml") in said


def test_what_may_change_may_be_edited_or_told(run_dir: Path, tell: Tell) -> None:
    edit(run_dir, keep_checkpoints=7, batch_size=1, gradient_accumulation_steps=2, eval_batches=2)
    tell("train", "--resume", str(run_dir), "--save_interval_steps", "3", status=0)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["keep_checkpoints"], config["save_interval_steps"]) == (7, 3)


@pytest.mark.parametrize(
    "content", [b'{"sta', b"\xff\xfe\0", b"[1]", b"{}"], ids=["cut", "bytes", "list", "empty"]
)
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("summary.json", "move it away and resume again"),
        ("result.json", "move it away and resume again: the run goes on from its newest checkpoint"),
        ("environment.json", "restore it from a copy, or start a new run"),
    ],
)
def test_a_damaged_record_is_named_with_what_to_do(
    finished: Path, tmp_path: Path, tell: Tell, name: str, advice: str, content: bytes
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    if name != "summary.json":
        (tmp_path / "run" / "summary.json").unlink()
    said = tell("train", "--resume", str(tmp_path / "run"))
    assert f"{tmp_path / 'run' / name} is damaged" in said
    assert advice in said


def test_after_moving_a_damaged_result_away_the_run_ends_as_before(run_dir: Path, tell: Tell) -> None:
    tell("train", "--resume", str(run_dir), status=0)
    assert (run_dir / "result.json").is_file()


def test_without_its_environment_a_run_does_not_go_on(run_dir: Path, tell: Tell) -> None:
    (run_dir / "environment.json").unlink()
    assert "environment.json is missing" in tell("train", "--resume", str(run_dir))


def test_a_config_that_was_cut_is_named(run_dir: Path, tell: Tell) -> None:
    lines = (run_dir / "config.yaml").read_text().splitlines()
    (run_dir / "config.yaml").write_text("\n".join(lines[: len(lines) // 2]))
    assert "config.yaml' lacks" in tell("train", "--resume", str(run_dir))
    for name in ("final", "checkpoints"):
        assert (run_dir / name).is_dir()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.jsonl", b'{"kind": "train", "st\n{}\n', "metrics.jsonl, line 1 is not JSON"),
        ("metrics.jsonl", b"\xff\n{}\n", "metrics.jsonl, line 1 is not JSON"),
        ("metrics.jsonl", b'{"kind": "train", "step": "x"}\n', "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", b'{"kind": "eval", "step": NaN}\n', "metrics.jsonl, line 1 is damaged"),
        ("events.jsonl", b'{"event": "growth", "step": 2}\n', "events.jsonl, line 1 is damaged"),
        ("events.jsonl", b'{"event": "growth", "step": 1' + b"0" * 400 + b"}\n", "events.jsonl, line 1"),
        ("lineage.json", b"[1]", "lineage.json is damaged"),
        ("lineage.json", b'{"records": [{"id": 0}]}', "lineage.json is damaged"),
        ("environment.json", b"[1]", "environment.json is damaged"),
        ("summary.json", b'{"depth', "summary.json is damaged"),
        ("config.yaml", b"a: &a [1]\nb: *a\n", "config.yaml': line 2"),
    ],
)
def test_a_report_of_damaged_records_names_the_file(
    finished: Path, tmp_path: Path, tell: Tell, name: str, content: bytes, told: str
) -> None:
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "snapshots"))
    (tmp_path / "run" / name).write_bytes(content)
    assert told in tell("report", str(tmp_path / "run"))
