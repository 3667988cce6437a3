"""Text to packed tokens, once: prepared data is kept under the hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from aiether.data._pack import encode, write_tokens
from aiether.data._scan import DOCUMENT_PIECE_SIZE, scan
from aiether.data.config import DataConfig
from aiether.data.sources import Source, file_hash, find_source
from aiether.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from aiether.data.tokens import TokenFile, token_dtype

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it done so far, 0 to 1."""

_FORMAT = 1  # raise it when the same input would give other tokens


@dataclass(frozen=True)
class PackedData:
    """Tokens of both sides, and what is needed to read the numbers of a run.

    Attributes:
        train, validation: memory-mapped tokens, each document followed by the end-of-text token.
        tokenizer_dir: a folder that `AutoTokenizer` loads; None for a tokenised dataset without tokenizer.
        vocab_size: number of token ids a model needs.
        eos_token_id: the token between documents; None where `tokenizer_dir` is.
        fingerprint: SHA-256 over the tokens of both sides and the tokenizer: equal data, equal fingerprint.
        source: what the data is, for people.
        num_documents: on both sides together.
        train_bytes, validation_bytes: UTF-8 bytes of text; None where the text is not known.
    """

    train: TokenFile
    validation: TokenFile
    tokenizer_dir: Path | None
    vocab_size: int
    eos_token_id: int | None
    fingerprint: str
    source: str
    num_documents: int
    train_bytes: int | None
    validation_bytes: int | None

    @property
    def train_tokens(self) -> int:
        """Tokens of the training side."""
        return len(self.train)

    @property
    def validation_tokens(self) -> int:
        """Tokens of the validation side."""
        return len(self.validation)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text a token of the validation side stands for; None where the text is not known.

        End-of-text tokens count as tokens without bytes.
        """
        if self.validation_bytes is None or not self.validation_tokens:
            return None
        return self.validation_bytes / self.validation_tokens


def prepare(config: DataConfig, progress: Progress | None = None) -> PackedData:
    """Give the packed tokens that `config` describes, from the cache or made now.

    The same content, settings and version give the same tokens. Preparation is atomic: until it is done,
    the cache does not change. Processes that ask for the same data at once wait for the first of them.

    Raises ValueError for data that cannot be used (missing, empty, binary, not UTF-8, too little).
    """
    config.validate()
    source = find_source(config.dataset_paths[0], config)
    folder = config.cache_root / "data" / _cache_key(config, source)
    if not _is_complete(folder):
        _make_writable(folder.parent)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not _is_complete(folder):
                _prepare_folder(config, source, folder, progress or _silent)
    return _load(folder, source.description)


def _silent(phase: str, fraction: float) -> None:
    """Report to nobody."""


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"prepared data cannot be kept in {folder} ({error.strerror}); "
            "give a writable folder with cache_dir"
        ) from error


def _cache_key(config: DataConfig, source: Source) -> str:
    tokenizer = f"bpe {config.vocab_size}" if config.tokenizer is None else tokenizer_hash(config.tokenizer)
    parts = (str(_FORMAT), source.content_hash(), tokenizer, repr(config.validation_fraction))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _is_complete(folder: Path) -> bool:
    """Whether a folder holds prepared data, every file as long as it was when it was written."""
    if not (folder / "data.json").is_file():
        return False
    files: dict[str, int] = _read_record(folder)["files"]
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )


def _read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "data.json").read_text(encoding="utf-8"))


def _load(folder: Path, description: str) -> PackedData:
    record = _read_record(folder)
    dtype = token_dtype(record["vocab_size"])
    return PackedData(
        train=TokenFile(folder / "train.bin", dtype),
        validation=TokenFile(folder / "validation.bin", dtype),
        tokenizer_dir=folder / "tokenizer" if record["eos_token_id"] is not None else None,
        source=description,
        **{key: record[key] for key in ("vocab_size", "eos_token_id", "fingerprint", "num_documents")},
        **{key: record[key] for key in ("train_bytes", "validation_bytes")},
    )


def _prepare_folder(config: DataConfig, source: Source, folder: Path, progress: Progress) -> None:
    """Make the prepared folder beside its place, then move it there. The caller holds the lock."""
    for left_over in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed
        shutil.rmtree(left_over)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        _write_folder(config, source, part, progress)
        if folder.exists():  # incomplete, or this function would not have been called
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_folder(config: DataConfig, source: Source, folder: Path, progress: Progress) -> None:
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    trains = tokenizer is None and not source.is_tokenised
    found = scan(source, trains, lambda fraction: progress("reading", fraction))
    if not found.documents.keys:
        raise ValueError(f"{source.description} is empty; give a source that holds text")
    held_out = found.validation(config.validation_fraction)
    if trains:
        progress("training the tokenizer", 0.0)
        tokenizer = train_tokenizer(found.training_sample(held_out), config.vocab_size)
        progress("training the tokenizer", 1.0)
    vocab_size = found.max_id + 1 if tokenizer is None else tokenizer.vocab_size
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    # Ids of a tokenised dataset are taken as they are: whoever made them placed the separators.
    separator = None if tokenizer is None or source.is_tokenised else tokenizer.eos_token_id
    pieces = found.read(source, DOCUMENT_PIECE_SIZE, lambda fraction: progress("tokenising", fraction))
    train_bytes, validation_bytes = write_tokens(
        folder, encode(pieces, tokenizer), held_out, vocab_size, separator
    )
    record = {
        "vocab_size": vocab_size,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_token_id,
        "num_documents": len(found.documents.keys),
        "train_bytes": train_bytes,
        "validation_bytes": validation_bytes,
    }
    _write_record(folder, record)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write data.json: the record, the size of every file and their common hash; all reach the disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file_hash(file))
        _flush(file)
    record |= {
        "fingerprint": digest.hexdigest(),
        "files": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
    }
    (folder / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _flush(folder / "data.json")


def _flush(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
