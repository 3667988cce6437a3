"""One process at a time works on a run folder."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: two processes on one folder are then not noticed
    fcntl = None

LOCK = "run.lock"
_held: dict[Path, int] = {}  # folder -> thread, of this process
_guard = threading.Lock()


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold a run folder (made if missing) against other processes; within one thread it may be nested.

    The system releases the lock when the process ends in whatever way, so a file that was left behind holds
    nobody up. Folders that were made here and are empty at the end go again.

    Raises
    ------
    ValueError
        If another process, or another thread of this one, holds the folder: names its process and host.
    """
    path, thread = directory.resolve(), threading.get_ident()
    with _guard:
        holder = _held.get(path)
        if holder not in (None, thread):
            raise ValueError(_refusal(directory, _own()))
        _held[path] = thread
    if holder == thread:
        yield
        return
    made: list[Path] = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with _locked(directory, path / LOCK):
            yield
    finally:
        for folder in made:
            with suppress(OSError):  # it is in use now
                folder.rmdir()
        with _guard:
            del _held[path]


@contextmanager
def _locked(directory: Path, lock: Path) -> Iterator[None]:
    descriptor = _acquire(directory, lock)
    try:
        os.truncate(descriptor, 0)
        with suppress(OSError):  # a full disk: the lock holds without a name on it
            os.write(descriptor, json.dumps(_own()).encode())
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)  # this releases the lock


def _acquire(directory: Path, lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if fcntl is not None:
                # Of the process, not of the file: a forked data worker that outlives us holds nothing.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 4096)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(_refusal(directory, _read(holder))) from None
            raise
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its holder removed the file between our two calls


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path` (opening that would end our lock when closed)."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own() -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": started}


def _read(content: bytes) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError:  # its holder is just writing it
        return {}


def _refusal(directory: Path, holder: dict[str, Any]) -> str:
    pid, host = holder.get("pid", "unknown"), holder.get("host", "unknown")
    return (
        f"the run folder {str(directory)!r} is in use by process {pid} on host {host}: wait for it, end it "
        f"with 'kill {pid}' there (it saves first), or name another folder"
    )
