"""What an unfinished preparation keeps on disk, so that the next one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from aiether.data._scan import Scan, Units

Units64 = npt.NDArray[np.uint64]


@dataclass
class Position:
    """How far the second pass is: everything up to here is on the disk."""

    pieces: int = 0
    tokens: tuple[int, int] = (0, 0)
    nbytes: tuple[int | None, int | None] = (0, 0)
    open_side: int | None = None


class WorkFolder:
    """The folder of one preparation: `out` becomes the result, the rest is dropped with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)

    def read_scan(self) -> Scan | None:
        """The finished first pass, or None; its sample is not kept, since the tokenizer is made by then."""
        path = self.folder / "scan.npz"
        if not path.is_file():
            return None
        with np.load(path) as stored:
            documents, sections = (
                Units.from_arrays(stored[f"{name}_keys"], stored[f"{name}_sizes"])
                for name in ("documents", "sections")
            )
            return Scan(documents, sections, max_id=int(stored["max_id"]))

    def write_scan(self, found: Scan) -> None:
        """Keep the first pass, after the tokenizer: where this file is, both are."""
        arrays: dict[str, Any] = {
            f"{name}_{what}": np.asarray(getattr(units, what), dtype=np.uint64)
            for name, units in (("documents", found.documents), ("sections", found.sections))
            for what in ("keys", "sizes")
        }
        _replace(
            self.folder / "scan.npz",
            lambda file: np.savez(file, max_id=np.int64(found.max_id), **arrays),
        )

    def read_position(self) -> Position:
        """Where the second pass stopped; the start where there is none."""
        path = self.folder / "position.json"
        if not path.is_file():
            return Position()
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Position(
            stored["pieces"], tuple(stored["tokens"]), tuple(stored["nbytes"]), stored["open_side"]
        )

    def write_position(self, position: Position) -> None:
        """Keep how far the second pass is. The caller has the tokens on the disk already."""
        text = json.dumps(asdict(position)).encode()
        _replace(self.folder / "position.json", lambda file: file.write(text))


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a reader, after whatever fault, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
