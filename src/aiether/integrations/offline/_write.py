"""Folders that appear whole or not at all, and safetensors files written one tensor at a time.

The library's own writer wants all tensors of a file in memory at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from .._fault import is_disk_full, size
from .._files import sync_file, write_json
from .._weights import INDEX
from ._tensors import DTYPES, Spec, StoredTensors, Stretch

Progress = Callable[[int, int], None]
"""Told how many bytes are written, of how many."""

PATTERN = "model{suffix}.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 24
_FLUSH = 1 << 27


def check_new(path: Path) -> None:
    """Raise ValueError if `path` exists: nothing is ever replaced."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"output_dir {str(path)!r} exists already: name a new folder")


def check_room(path: Path, nbytes: int) -> None:
    """Raise ValueError if the disk has too little room for `nbytes` more under `path`."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise ValueError(
            f"the grown checkpoint takes {size(nbytes)}, {size(free)} are free in {there}: free some space, "
            "or name another place with output_dir"
        )


def shard_bytes(max_shard_size: str) -> int:
    """A size such as "5GB" in bytes.

    Raises
    ------
    ValueError
        If it is none, or nothing fits into it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", max_shard_size.strip().upper())
    nbytes = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if nbytes <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size!r}: a size such as 5GB or 200MB is meant")
    return nbytes


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that gets its name when all is well, and is removed when not.

    Raises
    ------
    ValueError
        If `path` exists, or the disk is full.
    """
    check_new(path)
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*"), reverse=True):
            sync_file(file)
        sync_file(temporary)
        check_new(path)
        temporary.rename(path)
        sync_file(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise ValueError(
                f"{path} could not be written ({error.strerror}), and nothing of it was kept: free some "
                "space, or name another place"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def write_sharded(
    folder: Path, tensors: StoredTensors, max_shard_size: int, wrote: Callable[[int], None]
) -> None:
    """Write tensors as `save_pretrained` lays them out, reading each once and in the mapping's order.

    One file if all fit into `max_shard_size` bytes, else shards with an index. `wrote` is told the bytes of
    each tensor.
    """
    specs = tensors.specs
    split = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=PATTERN,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        with SafetensorsWriter(folder / file, {name: specs[name] for name in names}) as writer:
            for name in names:
                stretch = tensors.stretch(name)
                if stretch is None:
                    writer.write(name, tensors[name])
                else:
                    writer.copy(name, stretch)
                wrote(specs[name].nbytes)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


class SafetensorsWriter:
    """One safetensors file whose names and shapes are known from the start and whose data comes by and by.

    Use it as a context; a tensor that was not written when it ends raises.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.specs = path, dict(specs)
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        self._places: dict[str, int] = {}
        end = 0
        # Wide types first: every tensor then begins at a multiple of its element size.
        for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
            spec, start = specs[name], end
            end += spec.nbytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": spec.shape,
                "data_offsets": [start, end],
            }
            self._places[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._size = len(self._header) + end
        self._left = set(specs)
        self._file: BinaryIO
        self._flusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> SafetensorsWriter:
        self._file = self.path.open("wb", buffering=0)
        _write_all(self._file, self._header)
        if hasattr(os, "posix_fallocate"):  # a full disk is known at once
            os.posix_fallocate(self._file.fileno(), 0, self._size)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._flusher.shutdown(wait=True)
        self._file.close()
        if self._flushing is not None and error is None:
            self._flushing.result()
        assert error is not None or not self._left, f"never written: {sorted(self._left)[:3]}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the shape and dtype that were announced."""
        spec = self.specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
        self._file.seek(len(self._header) + self._places[name])
        _write_all(self._file, as_bytes(tensor))
        self._wrote(name)

    def copy(self, name: str, stretch: Stretch) -> None:
        """Copy one tensor's bytes from another file, inside the system where it can."""
        assert stretch.nbytes == self.specs[name].nbytes, name
        self._file.seek(len(self._header) + self._places[name])
        with stretch.path.open("rb", buffering=0) as source:
            copy_bytes(source.fileno(), stretch.start, self._file, stretch.nbytes)
        self._wrote(name)

    def _wrote(self, name: str) -> None:
        """Let the disk write what is there while the next tensors are made: all at the end takes longer."""
        self._left.remove(name)
        self._unflushed += self.specs[name].nbytes
        if self._unflushed < _FLUSH or (self._flushing is not None and not self._flushing.done()):
            return
        if self._flushing is not None:
            self._flushing.result()
        self._unflushed = 0
        self._flushing = self._flusher.submit(os.fsync, self._file.fileno())


def _write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """One call writes no more than 2 GiB."""
    left = memoryview(content)
    while len(left):
        left = left[file.write(left) :]


def copy_bytes(source: int, start: int, target: BinaryIO, nbytes: int) -> None:
    """Copy a stretch of an open file to where another one stands."""
    done = 0
    while done < nbytes:
        piece = min(_PIECE, nbytes - done)
        if hasattr(os, "copy_file_range"):
            place = target.tell()
            copied = _copied_inside(source, target.fileno(), piece, start + done, place)
            if copied:
                target.seek(place + copied)
                done += copied
                continue
        content = os.pread(source, piece, start + done)
        if not content:
            raise ValueError("a file became shorter while it was read: nobody may write to it meanwhile")
        _write_all(target, content)
        done += len(content)


def _copied_inside(source: int, target: int, nbytes: int, start: int, place: int) -> int:
    """Bytes that the system copied by itself; 0 where it cannot (between some file systems)."""
    try:
        return os.copy_file_range(source, target, nbytes, start, place)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            return 0
        raise


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy())) if flat.numel() else memoryview(b"")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, and nothing else of it."""
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _PIECE)
