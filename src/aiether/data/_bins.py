"""Tokenised .bin files, used where they lie: one file, or a folder with train.bin and val.bin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiether.data._hash import file_hash, shares
from aiether.data._text import clear_errors
from aiether.data.config import DataConfig
from aiether.data.tokens import TokenFile, token_dtype

_VALIDATION_NAMES = ("val.bin", "validation.bin")
_CHUNK = 1 << 22
_HEADER_MAGIC, _HEADER_BYTES = 20240520, 1024
"""llm.c's files begin with 256 int32: this number, a version, the count of tokens."""


@dataclass(frozen=True)
class Bins:
    """Both sides of a tokenised source; neither is ever copied."""

    train: TokenFile
    validation: TokenFile
    description: str

    def content_hash(self, on_read: Callable[[float], None]) -> str:
        """SHA-256 over the files, their dtype and where the sides part; `on_read` receives the share read."""
        digest = hashlib.sha256(f"bins {self.train.dtype} {len(self.train)} {len(self.validation)}".encode())
        paths = tuple(dict.fromkeys((self.train.path, self.validation.path)))
        on_bytes = shares(paths, on_read)
        for path in paths:
            digest.update(file_hash(path, on_bytes))
        return digest.hexdigest()


def open_bins(path: Path, config: DataConfig) -> Bins | None:
    """The token files at a path, or None where there are none.

    A folder keeps the split it has. Of a single file, the last `validation_fraction` is held out.

    Raises ValueError for a file that is empty, of an odd size, or seen to be of another dtype.
    """
    if path.is_file() and path.suffix == ".bin":
        return _single(path, config)
    if not (path / "train.bin").is_file():
        return None
    validation = next((path / name for name in _VALIDATION_NAMES if (path / name).is_file()), None)
    if validation is None:
        raise ValueError(
            f"dataset_path {str(path)!r} holds train.bin and no val.bin; add it, or name the file "
            f"{path / 'train.bin'} to hold out its end"
        )
    sides = (_open(path / "train.bin", config, "train"), _open(validation, config, "validation"))
    return Bins(*sides, f"{path} ({sides[0].dtype.name} tokens)")


def open_whole(path: Path, config: DataConfig) -> TokenFile | None:
    """What there is to evaluate on at a path: a .bin file whole, or the val.bin of a folder; None: no tokens.

    Raises ValueError as `open_bins`.
    """
    bins = open_bins(path, config)
    if bins is None:
        return None
    return _open(path, config, path.name) if path.is_file() else bins.validation


def _single(path: Path, config: DataConfig) -> Bins:
    whole = _open(path, config, "train")
    held_out = max(1, round(config.validation_fraction * len(whole)))
    begin = (path.stat().st_size // whole.dtype.itemsize) - len(whole)  # after a header
    cut = begin + len(whole) - held_out
    return Bins(
        TokenFile(path, whole.dtype, begin, cut, "train"),
        TokenFile(path, whole.dtype, cut, None, "validation"),
        f"{path} ({whole.dtype.name} tokens)",
    )


def _open(path: Path, config: DataConfig, name: str) -> TokenFile:
    size = path.stat().st_size
    with clear_errors(path), path.open("rb") as file:
        head = np.frombuffer(file.read(12), "<i4") if size >= _HEADER_BYTES else np.zeros(3, "<i4")
    dtype = _dtype(path, config)
    if head[0] == _HEADER_MAGIC and (size - _HEADER_BYTES) == int(head[2]) * 2:
        return TokenFile(path, "<u2", _HEADER_BYTES // 2, None, name)
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"{path} is {size} bytes long, which is no whole number of {dtype.name} tokens above 0; set "
            "token_dtype to the type that it was written with, or copy the file again"
        )
    tokens = TokenFile(path, dtype, 0, None, name)
    _refuse_other_dtype(tokens)
    return tokens


def _dtype(path: Path, config: DataConfig) -> np.dtype[Any]:
    """`token_dtype`, else what a file beside it says ({"dtype": ...} or {"vocab_size": ...}), else uint16."""
    if config.token_dtype is not None:
        return np.dtype(config.token_dtype).newbyteorder("<")
    for sidecar in (path.with_suffix(".json"), path.with_name("meta.json"), path.with_name("data.json")):
        if sidecar.is_file():
            with clear_errors(sidecar):
                stored = _stored(sidecar)
            if stored.get("dtype") in ("uint16", "uint32"):
                return np.dtype(stored["dtype"]).newbyteorder("<")
            if isinstance(stored.get("vocab_size"), int):
                return token_dtype(stored["vocab_size"])
    return np.dtype("<u2")


def _stored(sidecar: Path) -> dict[str, Any]:
    try:
        stored = json.loads(sidecar.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{sidecar} is not JSON ({error}); repair it, or set token_dtype") from error
    return stored if isinstance(stored, dict) else {}


def _refuse_other_dtype(tokens: TokenFile) -> None:
    """uint32 read as uint16 shows as a zero in every second place; the other way round, as huge ids."""
    sample = tokens[: 1 << 16]
    if tokens.dtype.itemsize == 2 and len(sample) >= 64 and len(sample) % 2 == 0:
        if not sample[1::2].any() and sample[::2].any():
            raise ValueError(
                f"{tokens.path} reads as uint16 with a zero in every second place: it looks like uint32; "
                "set token_dtype uint32"
            )
    elif tokens.dtype.itemsize == 4 and len(sample) and (sample >= 1 << 24).mean() > 0.5:
        raise ValueError(
            f"{tokens.path} reads as uint32 with ids above {1 << 24}: it looks like uint16; "
            "set token_dtype uint16"
        )


def max_id(bins: Bins, on_read: Callable[[float], None]) -> int:
    """The highest id of both sides, read in stretches; `on_read` receives the share read so far."""
    highest, done, total = 0, 0, len(bins.train) + len(bins.validation)
    for tokens in (bins.train, bins.validation):
        for start in range(0, len(tokens), _CHUNK):
            stretch = tokens[start : start + _CHUNK]
            highest, done = max(highest, int(stretch.max())), done + len(stretch)
            if done < total:
                on_read(done / total)
    return highest
