"""Files that are whole or absent, and the checksums that tell a damaged one."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PIECE = 1 << 20


def sync_file(path: Path) -> None:
    """Flush a file (or a folder's entries) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1))
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # what a full disk left of it
    sync_file(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` to write into; in the end it is synced and takes that place.

    If the block raises, nothing of it stays and `path` is as it was. A kill leaves the old folder, the new
    one or (between two renames) none, never a part.
    """
    temporary, old = (path.with_name(f".{path.name}.{ending}") for ending in ("tmp", "old"))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            sync_file(entry)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_file(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def seal(path: Path) -> list[int]:
    """Flush a file to the disk; returns its size in bytes and its CRC-32, for `damage`."""
    checksum = _crc32(path)
    sync_file(path)
    return [path.stat().st_size, checksum]


def damage(path: Path, sealed: list[int], *, read: bool) -> str | None:
    """What is wrong with a file that was sealed as `sealed`; None if nothing is.

    Missing files and other sizes are found at once. With `read`, the content is compared too: CRC-32 finds
    every flipped bit, every damaged stretch of up to 32 bits, and all but one in 2**32 of other changes.
    """
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != sealed[0]:
        return f"{path.name} has {size:,} bytes, {sealed[0]:,} were written"
    if read and _crc32(path) != sealed[1]:
        return f"{path.name} is not as it was written (its checksum differs)"
    return None


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum
