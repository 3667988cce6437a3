"""One process at a time on a run folder. The other process loads the lock's file alone, to be quick."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiether.integrations import _lock, fit, hold

from .test_fit import growth
from .tiny import tiny_trainer

HOLDER = """
import os, runpy, sys, time
with runpy.run_path(sys.argv[1])["hold"](__import__("pathlib").Path(sys.argv[2])):
    if sys.argv[3] == "with-child" and os.fork() == 0:  # as a data worker would be
        os.write(1, b"child %d\\n" % os.getpid())
        time.sleep(60)
    os.write(1, b"holds\\n")
    time.sleep(60)
"""


@contextmanager
def holder(directory: Path, mode: str = "alone") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(_lock.__file__), str(directory), mode],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(1 + (mode == "with-child"))]
        assert "holds\n" in said
        yield process, said
    finally:
        process.kill()
        process.wait()


def test_a_second_process_is_refused_with_the_holders_id_and_host(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as (process, _):
        with (
            pytest.raises(ValueError, match=f"in use by process {process.pid} on host") as refused,
            hold(folder),
        ):
            pass
        assert os.uname().nodename in str(refused.value)
        with pytest.raises(ValueError, match="in use by process"):
            fit(tiny_trainer(tmp_path), growth())
        with pytest.raises(ValueError, match="in use by process"):
            fit(tiny_trainer(tmp_path), growth(), resume=True)
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "run.lock").exists(), "a stale file must be there, or this shows nothing"
        with hold(tmp_path):
            assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
        assert not (tmp_path / "run.lock").exists()


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path, "with-child") as (process, said):
        child = int(next(line for line in said if line.startswith("child")).split()[1])
        try:
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            with hold(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_within_a_thread_it_nests_and_another_thread_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with hold(tmp_path):
                pass
        except ValueError as error:
            refused.append(str(error))

    with hold(tmp_path):
        with hold(tmp_path / "." / "x" / ".."):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert str(os.getpid()) in refused[0]
    with holder(tmp_path):
        pass  # it was free again


def test_folders_that_were_made_and_stayed_empty_go_again(tmp_path: Path) -> None:
    with hold(tmp_path / "runs" / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "runs" / "new"):
        (tmp_path / "runs" / "new" / "file").touch()
    assert (tmp_path / "runs" / "new" / "file").exists()
