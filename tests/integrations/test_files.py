"""Folders and files that are whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiether.integrations import _files, whole_folder


def write(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "inner").mkdir()
        for name in ("a.txt", "inner/b.txt"):
            (folder / name).write_text(text)


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "final", text)
        assert content(tmp_path / "final") == {"a.txt": text, "inner/b.txt": text}
        assert names(tmp_path) == ["final"]


def test_all_of_it_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    honest_sync, honest_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        done.append(("sync", os.fstat(descriptor).st_ino))
        honest_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append(("rename", self.stat().st_ino))
        return honest_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    final = tmp_path / "final"
    write(final, "text")
    at = done.index(("rename", final.stat().st_ino))
    assert set(done[:at]) == {("sync", path.stat().st_ino) for path in (final, *final.rglob("*"))}
    assert done[at + 1 :] == [("sync", tmp_path.stat().st_ino)]


def test_what_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    final = tmp_path / "final"
    write(final, "old")

    def fail() -> None:
        with whole_folder(final) as folder:
            (folder / "a.txt").write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert content(final) == {"a.txt": "old", "inner/b.txt": "old"}
    assert names(tmp_path) == ["final"]


KILLED = """
import os, pathlib, signal, sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("files", sys.argv[1])
files = module_from_spec(spec)
spec.loader.exec_module(files)
calls, rename = 0, pathlib.Path.rename
def killed(self, target):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = killed
with files.whole_folder(pathlib.Path(sys.argv[2])) as folder:
    (folder / "a.txt").write_text("new")
"""


@pytest.mark.parametrize(("at_rename", "left"), [(1, {"a.txt": "old", "inner/b.txt": "old"}), (2, None)])
def test_a_kill_leaves_the_old_folder_or_none_and_the_next_write_tidies_up(
    tmp_path: Path, at_rename: int, left: dict[str, str] | None
) -> None:
    final = tmp_path / "final"
    write(final, "old")
    command = [sys.executable, "-c", KILLED, str(_files.__file__), str(final), str(at_rename)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (content(final) if final.exists() else None) == left
    write(final, "again")
    assert names(tmp_path) == ["final"]
