"""SHA-256 of files, and how far it is: hashing what is large takes minutes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

TOLD_BYTES = 1 << 26
"""A share is told each time that so much more has been read; what is smaller takes no time worth telling."""
_PIECE = 1 << 20


def file_hash(path: Path, on_bytes: Callable[[int], None] | None = None) -> bytes:
    """SHA-256 of a file's bytes; `on_bytes` receives the number in each piece read.

    Raises ValueError for what cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise OSError("it is neither a file nor a link to one")
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); check path and rights"
        ) from error
    return digest.digest()


def shares(paths: Iterable[Path], on_read: Callable[[float], None]) -> Callable[[int], None]:
    """An `on_bytes` for `file_hash` over all of `paths` that tells `on_read` the share done, 0 to 1."""
    total, done = sum(map(_size, paths)), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if before // TOLD_BYTES < done // TOLD_BYTES:
            on_read(min(1.0, done / max(total, 1)))

    return on_bytes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # for `file_hash` to tell
        return 0
