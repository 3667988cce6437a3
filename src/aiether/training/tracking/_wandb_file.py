"""What W&B's own file says of itself: whether a run that was closed is whole in it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _RECORD_HEADER = 7, 1 << 15, 7
_WHOLE, _LAST = 1, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    content, at, record = path.read_bytes(), _HEADER, b""
    while at + _RECORD_HEADER <= len(content):
        if (left := _BLOCK - at % _BLOCK) < _RECORD_HEADER:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += _RECORD_HEADER + length
        record += content[at - length : at]
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""


def holds_its_end(path: Path, *, within_s: float) -> bool:
    """Whether the record of the run's end is there; it is written after all others, shortly after `finish`.

    W&B tells nobody when the disk is full; it stops writing at once and for good.
    """
    deadline = time.monotonic() + within_s
    while not _ends(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _ends(path: Path) -> bool:
    record: Any = import_module("wandb.proto.wandb_internal_pb2").Record
    damaged: Any = import_module("google.protobuf.message").DecodeError
    try:
        return any(record.FromString(each).HasField("exit") for each in deque(records(path), maxlen=8))
    except damaged:
        return False
