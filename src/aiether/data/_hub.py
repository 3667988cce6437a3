"""Data sets on the Hub: streamed once into compressed shards of rows, which are then read like any file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from filelock import FileLock

from aiether.data._reach import no_answer
from aiether.data._rows import no_column, row_text
from aiether.data.config import DataConfig
from aiether.data.sources import TextFiles

PREFIX = "hub:"
Progress = Callable[[str, float], None]
SHARD_BYTES = 1 << 26
_SPEC = re.compile(
    r"hub:(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[\w.-]+))??(?::(?P<split>\w+)(?:\[:(?P<rows>\d+)\])?)?"
)


@dataclass(frozen=True)
class HubName:
    """A data set on the Hub: its name, its configuration, its split, and how many rows from the start."""

    name: str
    config: str | None
    split: str
    rows: int | None

    @classmethod
    def parse(cls, spec: str) -> HubName:
        """Read `hub:NAME[:CONFIG][:SPLIT]`, the split perhaps with a number of rows, as in train[:1000].

        One word after the name is a split if it is train, validation or test or carries rows, else a
        configuration. Raises ValueError for another form.
        """
        found = _SPEC.fullmatch(spec)
        if not found:
            raise ValueError(
                f"dataset_path {spec!r} is no data set on the Hub; the form is hub:NAME[:CONFIG][:SPLIT], "
                "as in hub:roneneldan/TinyStories or hub:owner/name:en:train[:100000]"
            )
        config, split, rows = found["config"], found["split"], found["rows"]
        if config is None and rows is None and split not in (None, "train", "validation", "test"):
            config, split = split, None
        if rows is not None and int(rows) == 0:
            raise ValueError(f"dataset_path {spec!r} asks for no rows; give at least 1")
        return cls(found["name"], config, split or "train", None if rows is None else int(rows))

    def __str__(self) -> str:
        """The full form."""
        rows = "" if self.rows is None else f"[:{self.rows}]"
        return ":".join(part for part in ("hub", self.name, self.config, f"{self.split}{rows}") if part)


def hub_source(spec: str, config: DataConfig, progress: Progress) -> TextFiles:
    """The rows of a data set on the Hub as files in the cache, downloaded now where they are not there yet.

    An interrupted download goes on after its last complete shard. Once complete, no network is needed.

    Raises ValueError when the data set cannot be reached, does not exist, or lacks the text column.
    """
    wanted = HubName.parse(spec)
    words = f"{wanted} {config.text_column}"
    folder = config.cache_root / "hub" / hashlib.sha256(words.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not _state(folder)["complete"]:
            _download(wanted, config.text_column, folder, progress)
    shards = tuple(sorted(folder.glob("*.jsonl.zst")))
    if not shards:
        shutil.rmtree(folder)
        raise ValueError(f"dataset_path {str(wanted)!r} holds no rows; name another split")
    return TextFiles(shards, str(wanted), "text")


def _state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    found = {"rows": 0, "shards": 0, "complete": False}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found


def _download(wanted: HubName, column: str, folder: Path, progress: Progress) -> None:
    state = _state(folder)
    dataset, total = _open(wanted)
    rows = iter(dataset.skip(state["rows"]) if state["rows"] else dataset)
    texts = _texts(
        rows, wanted, column, state["rows"], lambda done: progress("downloading", _share(done, total))
    )
    while not state["complete"]:
        taken = _write_shard(folder / f"{state['shards']:06d}.jsonl.zst", texts)
        state = {
            "rows": state["rows"] + taken,
            "shards": state["shards"] + (taken > 0),
            "complete": taken == 0,
        }
        temporary = folder / ".state.tmp"
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, folder / "state.json")


def _share(done: int, total: int | None) -> float:
    return min(1.0, done / total) if total else 0.0


def _open(wanted: HubName) -> tuple[Any, int | None]:
    """The stream of rows, and how many there are where that is known."""
    import datasets  # heavy, and needed for this source alone

    if error := no_answer(wanted.name, "dataset"):
        raise ValueError(_unreachable(wanted, error)) from error
    try:
        stream: Any = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
    except Exception as error:  # of several libraries: no network, no such name, configuration or split
        raise ValueError(_unreachable(wanted, error)) from error
    splits = stream.info.splits or {}
    total = splits[wanted.split].num_examples if wanted.split in splits else None
    if wanted.rows is None:
        return stream, total
    return stream.take(wanted.rows), min(total or wanted.rows, wanted.rows)


def _texts(
    rows: Iterator[dict[str, Any]],
    wanted: HubName,
    column: str,
    number: int,
    on_row: Callable[[int], None],
) -> Iterator[str]:
    """The text of every row; `number` rows lie before them."""
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the network, in the middle of the stream
            raise ValueError(_unreachable(wanted, error)) from error
        if row is None:
            return
        if column not in row:
            raise ValueError(no_column(str(wanted), column, list(row)))
        yield row_text(row[column], f"row {number} of {wanted}", column)
        number += 1
        on_row(number)


def _write_shard(path: Path, texts: Iterator[str]) -> int:
    """Write rows up to SHARD_BYTES as JSON Lines; return their number. No file where there are none."""
    temporary = path.with_name(f".{path.name}.tmp")
    taken = size = 0
    with temporary.open("wb") as file:
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as compressed:
            while size < SHARD_BYTES and (text := next(texts, None)) is not None:
                size += compressed.write(json.dumps({"text": text}).encode() + b"\n")
                taken += 1
        file.flush()
        os.fsync(file.fileno())
    if taken:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    return taken


def _unreachable(wanted: HubName, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"dataset_path {str(wanted)!r} cannot be read from the Hub ({reason}); check the name, its "
        "configuration and split, and the network, or download it elsewhere and give its files"
    )
