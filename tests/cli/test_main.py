from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import aiether
from aiether.cli import main
from aiether.cli._main import COMMANDS

REPOSITORY = Path(__file__).parents[2]


def test_help_names_every_command_quickly_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from aiether.cli import main; status = main(['--help']); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    elapsed_s = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert (
        elapsed_s < 3
    )  # about 0.1 s on an idle machine; torch alone takes longer than this bound on a busy one


@pytest.mark.parametrize(
    "arguments",
    [
        ("trian",),
        ("train", "--learning_rate", "1"),
        ("train", "--dataset_path", "does-not-exist.txt"),
        ("train", "--resume", "runs/none"),
        ("generate", "does-not-exist", "x"),
        ("generate",),
        ("report", "does-not-exist"),
        ("triggers", "does-not-exist"),
        ("halting", "does-not-exist", "--dataset_path", "x.txt"),
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("aiether ")


@pytest.mark.parametrize("program", [("-m", "aiether", "train"), (str(REPOSITORY / "scripts" / "train.py"),)])
def test_the_programs_exit_with_that_status_and_no_traceback(
    program: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, *program, "--learning_rate", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown flag '--learning_rate'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_without_a_command_the_overview_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: aiether COMMAND" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aiether {aiether.__version__}\n"


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIETHER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main(["trian"])


def test_an_interrupt_has_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiether.cli import report

    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", interrupt)
    assert main(["report", "x"]) == 130
