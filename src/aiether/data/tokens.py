"""Token files: flat arrays of token ids on disk, memory-mapped when read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_DTYPES = (np.dtype("<u2"), np.dtype("<u4"))  # little-endian on disk, whatever wrote them


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype that holds every id below `vocab_size`: uint16, else uint32."""
    for dtype in _DTYPES:
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise ValueError(
        f"the tokenizer's vocabulary has {vocab_size} entries; allowed are at most {2**32} (uint32 tokens); "
        "use a tokenizer with smaller ids"
    )


class TokenFile:
    """Tokens of one side of the data, read where they lie.

    `len(file)` is the number of tokens; a slice gives a uint16 or uint32 array that views the disk.
    It pickles as a path, so that workers map the file themselves.

    Args:
        path: the file of ids, little-endian.
        dtype: their type.
        start, stop: which ids of the file, by number; None: to the end.
        name: what messages call it; None: the file's name without suffix.
    """

    def __init__(
        self,
        path: Path,
        dtype: npt.DTypeLike,
        start: int = 0,
        stop: int | None = None,
        name: str | None = None,
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.name = name or path.stem
        self._start = start
        held = path.stat().st_size // self.dtype.itemsize
        self._length = max(0, (held if stop is None else min(stop, held)) - start)
        self._map: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        if self._map is None:
            # An empty file cannot be mapped.
            empty = np.empty(0, self.dtype)
            self._map = self._mapped() if self._length else empty
        return self._map[index]

    def _mapped(self) -> npt.NDArray[Any]:
        whole = np.memmap(self.path, self.dtype, mode="r")
        return whole[self._start : self._start + self._length]

    def renamed(self, name: str) -> TokenFile:
        """The same tokens under another name for messages."""
        return TokenFile(self.path, self.dtype, self._start, self._start + self._length, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}, {len(self)} tokens, {self.dtype.name})"


class TokenWriter:
    """Appends ids to a token file, after the first `count` that it holds; a context manager."""

    def __init__(self, path: Path, vocab_size: int, count: int = 0) -> None:
        self.count = count
        self._vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._file = path.open("r+b" if count else "wb")
        self._file.truncate(count * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def write(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append ids. Raises ValueError for one that the vocabulary does not hold."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self._vocab_size:
            outside = array.min() if array.min() < 0 else array.max()
            raise ValueError(
                f"the data holds token id {outside}, the tokenizer's vocabulary has {self._vocab_size} "
                "entries; give the tokenizer that made the ids"
            )
        self.count += array.size
        self._file.write(array.astype(self.dtype).tobytes())

    def sync(self) -> None:
        """Have everything written so far on the disk itself."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
