"""Where documents come from: files of text or rows, Python's own source, `save_to_disk` datasets."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from aiether.data._hash import file_hash, shares
from aiether.data._rows import ROW_READERS, Row, row_text
from aiether.data._text import COMPRESSION_SUFFIXES, END_OF_TEXT, read_text, split_documents
from aiether.data.config import DataConfig

_PROSE_SUFFIXES = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".htm", ".xml"}
_CODE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"}
_CODE_SUFFIXES |= {
    ".kt",
    ".js",
    ".jsx",
    ".ts",
    ".tsx",
    ".rb",
    ".php",
    ".pl",
    ".lua",
    ".r",
    ".jl",
    ".hs",
    ".ml",
}
_CODE_SUFFIXES |= {".scala", ".swift", ".sh", ".sql", ".css", ".yaml", ".yml", ".toml", ".ini", ".cfg"}
TEXT_SUFFIXES = frozenset(_PROSE_SUFFIXES | _CODE_SUFFIXES)
# .json is as often a setting as it is data: in a folder it is left out, by name or glob it is read as rows.
FOLDER_SUFFIXES = TEXT_SUFFIXES | (ROW_READERS.keys() - {".json"})
Ids = npt.NDArray[np.int64]
_ROWS = 256
ReadProgress = Callable[[float], None]


class Section(NamedTuple):
    """A piece of one document, text or token ids; `last` marks the document's end."""

    content: str | Ids
    last: bool


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def description(self) -> str:
        """What a person would call it."""
        ...

    @property
    def is_tokenised(self) -> bool:
        """Whether sections are token ids instead of text."""
        ...

    def content_hash(self, on_read: ReadProgress) -> str:
        """A hash of everything that `sections` depends on; `on_read` receives the share read so far."""
        ...

    def sections(self, limit: int, on_read: ReadProgress) -> Iterator[Section]:
        """All documents in pieces of about `limit` characters or ids; the cuts do not depend on state.

        `on_read` receives the share read so far, 0 to 1.
        """
        ...


@dataclass(frozen=True)
class TextFiles:
    """Files of text or of rows, compressed or not, in the order given; the suffix tells the kind."""

    paths: tuple[Path, ...]
    description: str
    text_column: str = "text"
    is_tokenised: bool = False

    def content_hash(self, on_read: ReadProgress) -> str:
        """SHA-256 over the files as they lie on disk, the suffixes that tell how to open them, the column."""
        digest, on_bytes = hashlib.sha256(b"text"), shares(self.paths, on_read)
        for path in self.paths:
            digest.update(file_hash(path, on_bytes) + path.suffix.lower().encode())
            if (kind := kind_suffix(path.name)) in ROW_READERS:
                digest.update(f"{kind} {self.text_column}".encode())
        return digest.hexdigest()

    def sections(self, limit: int, on_read: ReadProgress) -> Iterator[Section]:
        """See `Source`. A document is a row, a text file, or a part of one between lines of <|endoftext|>."""
        total = max(1, sum(path.stat().st_size for path in self.paths))
        done = 0
        for path in self.paths:
            size = path.stat().st_size
            reader = ROW_READERS.get(kind_suffix(path.name))
            found = (
                _text_sections(path, limit)
                if reader is None
                else _row_sections(reader(path, self.text_column), limit)
            )
            for section, share in found:
                yield section
                on_read((done + share * size) / total)
            done += size


def _text_sections(path: Path, limit: int) -> Iterator[tuple[Section, float]]:
    size = max(1, path.stat().st_size)
    read = _Counted(read_text(path))
    for piece in split_documents(read, limit):
        yield Section(*piece), read.position / size


def _row_sections(rows: Iterator[Row], limit: int) -> Iterator[tuple[Section, float]]:
    for text, share in rows:
        for section in split_text(text, limit):
            yield section, share


class _Counted:
    """The text of a file; `position` follows the bytes read of it."""

    def __init__(self, blocks: Iterator[tuple[str, int]]) -> None:
        self._blocks = blocks
        self.position = 0

    def __iter__(self) -> Iterator[str]:
        for block, self.position in self._blocks:  # noqa: B020 (the attribute is the loop's own variable)
            yield block


@dataclass(frozen=True)
class SavedDataset:
    """A `datasets.Dataset` on disk: one row, one document."""

    path: Path
    text_column: str
    dataset: Any
    is_tokenised: bool

    @property
    def description(self) -> str:
        """The path and the column that is read."""
        return f"{self.path} (column {'input_ids' if self.is_tokenised else self.text_column})"

    def content_hash(self, on_read: ReadProgress) -> str:
        """SHA-256 over the Arrow files, and the column read."""
        column = "input_ids" if self.is_tokenised else self.text_column
        digest = hashlib.sha256(f"dataset {column} {len(self.dataset)}".encode())
        files = sorted(self.path.glob("*.arrow"))
        on_bytes = shares(files, on_read)
        for file in files:
            digest.update(file_hash(file, on_bytes))
        return digest.hexdigest()

    def sections(self, limit: int, on_read: ReadProgress) -> Iterator[Section]:
        """See `Source`."""
        stored = self.dataset.with_format("arrow")
        for start in range(0, len(self.dataset), _ROWS):
            _check_rows(stored, start, self.path)
            batch = self.dataset[start : start + _ROWS]
            for offset in range(len(next(iter(batch.values())))):
                row = {name: column[offset] for name, column in batch.items()}
                if self.is_tokenised:
                    yield from _cut_ids(_row_ids(row, start + offset, self.path), limit)
                else:
                    place = f"row {start + offset} of {self.path}"
                    text = row_text(row[self.text_column], place, self.text_column)
                    yield from split_text(text, limit)
            on_read(min(1.0, (start + _ROWS) / len(self.dataset)))


def _check_rows(stored: Any, start: int, path: Path) -> None:
    """A damaged file can hold lengths that lead outside of it, and pyarrow would follow them."""
    import pyarrow as pa

    try:
        stored[start : start + _ROWS].validate(full=True)
    except (pa.ArrowException, OSError, SystemError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}); save the dataset again") from error


def split_text(text: str, limit: int) -> Iterator[Section]:
    """One document in memory, in pieces; a line of <|endoftext|> inside it ends it here too."""
    if len(text) <= limit and END_OF_TEXT not in text:
        if text and not text.isspace():
            yield Section(text, True)
        return
    for piece in split_documents((text,), limit):
        yield Section(*piece)


def find_source(dataset_path: str | None, config: DataConfig) -> Source:
    """The source that one `dataset_path` names; `config` says how it is read.

    Raises ValueError when the path is missing or holds nothing to read.
    """
    if dataset_path is None:
        return standard_library()
    path = Path(dataset_path).expanduser()
    if path.is_file():
        return TextFiles((path,), str(path), config.text_column)
    if path.is_dir():
        is_dataset = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        column = config.text_column
        return open_saved_dataset(path, column) if is_dataset else _folder(path, column)
    if glob.has_magic(str(path)):
        return _glob(str(path), config.text_column)
    raise ValueError(
        f"dataset_path {dataset_path!r} does not exist; allowed are a file of text, rows or tokens, a "
        "folder, a glob, a save_to_disk folder and hub:NAME; check the path, or leave it out to train "
        "on Python's standard library"
    )


def _folder(path: Path, text_column: str) -> TextFiles:
    files = tuple(file for file in _walk(path) if is_text_name(file.name))
    if not files:
        raise ValueError(
            f"dataset_path {str(path)!r} holds no text files; looked for "
            f"{' '.join(sorted(FOLDER_SUFFIXES))}, also with {' '.join(COMPRESSION_SUFFIXES)}; name others "
            f"by a glob such as '{path}/**/*.ext'"
        )
    return TextFiles(files, f"{path} ({len(files)} files)", text_column)


def _glob(pattern: str, text_column: str) -> TextFiles:
    files = tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name))
    if not files:
        raise ValueError(
            f"dataset_path {pattern!r} matches no file; `*` stays within one folder and `**` goes through "
            "folders; check the pattern (and quote it in the shell)"
        )
    return TextFiles(files, f"{pattern} ({len(files)} files)", text_column)


def _walk(root: Path, skip: frozenset[str] = frozenset({"__pycache__"})) -> Iterator[Path]:
    """Every file under a folder, hidden ones left out, ordered by its path within the folder."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return iter(sorted(found, key=lambda file: file.relative_to(root).as_posix()))


def is_text_name(name: str) -> bool:
    """Whether a file's name tells plain text or rows of text, compressed or not."""
    return kind_suffix(name) in FOLDER_SUFFIXES


def kind_suffix(name: str) -> str:
    """The suffix that tells what a file holds: `.txt` of `a.TXT.gz`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix


# Tests repeat themselves, encodings and pydoc_data are generated tables, the others are not the library.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "site-packages"}
)
_NOT_LIBRARY |= {"dist-packages", "_bundled", "__phello__", "__pycache__"}


def standard_library() -> TextFiles:
    """The source of Python's own standard library, without tests, generated tables and site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(file for file in _walk(root, _NOT_LIBRARY) if _is_library_source(file.relative_to(root)))
    if not files:
        raise ValueError(
            f"Python's standard library at {root} holds no .py source (a zipped or stripped Python); "
            "give a text with dataset_path"
        )
    return TextFiles(files, f"Python {platform.python_version()} standard library ({len(files)} files)")


def _is_library_source(path: Path) -> bool:
    # _sysconfigdata*.py and config-*/ describe the machine that built Python; stringprep.py is a table.
    generated = path.name.startswith("_sysconfigdata") or path.parts[0].startswith("config-")
    return path.suffix == ".py" and not generated and path.name != "stringprep.py"


def open_saved_dataset(path: Path, text_column: str) -> SavedDataset:
    """A `save_to_disk` folder; of a dataset with several splits, the one called `train`.

    Raises ValueError when it has neither token ids (`input_ids`) nor the text column, or no `train` split.
    """
    import datasets  # heavy, and needed for this source alone
    import pyarrow as pa

    try:
        for state in (path / "state.json", path / "train" / "state.json"):
            _check_inside(state)
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ValueError(
            f"dataset_path {str(path)!r} looks like a save_to_disk folder and cannot be loaded ({error}); "
            "save the dataset again"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ValueError(
                f"dataset_path {str(path)!r} has the splits {', '.join(map(str, loaded))} and no `train`; "
                "give the folder of one split"
            )
        path, loaded = path / "train", loaded["train"]
    columns = loaded.column_names
    if "input_ids" in columns:
        keep = [name for name in ("input_ids", "attention_mask") if name in columns]
        return SavedDataset(path, text_column, loaded.select_columns(keep).with_format("numpy"), True)
    if text_column not in columns:
        raise ValueError(
            f"dataset_path {str(path)!r} has the columns {', '.join(columns)}, neither `input_ids` nor "
            f"text_column {text_column!r}; name the column of the text with text_column"
        )
    return SavedDataset(path, text_column, loaded.select_columns([text_column]), False)


def _check_inside(state: Path) -> None:
    """The files of a saved dataset lie beside its state.json: what is elsewhere would not be in its hash."""
    files = json.loads(state.read_text(encoding="utf-8"))["_data_files"] if state.is_file() else []
    outside = [name for name in (str(file["filename"]) for file in files) if Path(name).name != name]
    if outside:
        raise ValueError(f"{state.name} names {outside[0]!r}, outside of the folder")


def _row_ids(row: dict[str, Any], index: int, path: Path) -> Ids:
    """One row's token ids, without the positions that its attention mask marks as padding."""
    ids = np.asarray(row["input_ids"])
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)) or (ids < 0).any():
        raise ValueError(
            f"row {index} of {path} holds input_ids of shape {ids.shape} and type {ids.dtype}; needed is "
            "one list of non-negative integers a row; tokenise the dataset again"
        )
    if "attention_mask" in row:
        ids = ids[np.asarray(row["attention_mask"]).astype(bool)]
    return ids.astype(np.int64)


def _cut_ids(ids: Ids, limit: int) -> Iterator[Section]:
    for start in range(0, len(ids), limit):
        yield Section(ids[start : start + limit], start + limit >= len(ids))
