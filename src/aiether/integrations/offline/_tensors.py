"""Tensors that lie in files and are loaded one at a time, when they are asked for."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._weights import INDEX, WEIGHTS, check_weights, read_mapping

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of the safetensors format that have one value an element."""


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is loaded."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stretch:
    """A stretch of a file."""

    path: Path
    start: int
    nbytes: int


class StoredTensors(Mapping[str, Tensor]):
    """A mapping whose tensors are loaded when they are asked for, each time anew."""

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Shape and dtype, without loading the tensor."""

    def stretch(self, name: str) -> Stretch | None:
        """Where the bytes of a tensor lie in a file, if they lie in one as safetensors has them."""
        return None

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: self.spec(name) for name in self}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


class SafetensorsFiles(StoredTensors):
    """The tensors of some safetensors files. What is loaded is a view of the file, which takes no memory
    that the system cannot take back, as long as nobody writes to it."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = dict(places)
        self._files: dict[Path, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}

    @classmethod
    def of_file(cls, path: Path) -> SafetensorsFiles:
        """All tensors of one file."""
        handle = _open(path)
        files = cls(dict.fromkeys(handle.keys(), path))
        files._files[path] = handle
        return files

    @classmethod
    def of_folder(cls, folder: Path) -> SafetensorsFiles:
        """The weights of a model folder, in one file or in the shards that its index names.

        Raises
        ------
        ValueError
            If there are none (pickled ones are not read), the index or a header is damaged or leads out of
            the folder, or a shard lacks a tensor that the index places there.
        """
        check_weights(folder)
        if (folder / WEIGHTS).is_file():
            return cls.of_file(folder / WEIGHTS)
        placed: dict[str, str] = read_mapping(folder / INDEX)["weight_map"]
        files = cls({name: folder / shard for name, shard in placed.items()})
        for name, path in files._places.items():
            if name not in files._names(path):
                raise ValueError(
                    f"{path} lacks {name!r}, which {folder / INDEX} places there: copy the model again"
                )
        return files

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:  # the inherited one would load the tensor
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        return self._file(self._places[name]).get_tensor(name)

    def spec(self, name: str) -> Spec:
        piece = self._file(self._places[name]).get_slice(name)
        kind = piece.get_dtype()
        if kind not in DTYPES:
            raise ValueError(
                f"{name!r} in {self._places[name]} has type {kind}, which packs values: take the model "
                "before it was quantised"
            )
        return Spec(tuple(piece.get_shape()), DTYPES[kind])

    def stretch(self, name: str) -> Stretch:
        path = self._places[name]
        if path not in self._headers:
            self._headers[path] = _header(path)
        base, header = self._headers[path]
        start, stop = header[name]["data_offsets"]
        return Stretch(path, base + start, stop - start)

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = _open(path)
        return self._files[path]

    def _names(self, path: Path) -> frozenset[str]:
        return frozenset(self._file(path).keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged ({reason}): copy or download it again") from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header. (The library has checked it on opening.)"""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))
