"""Sources to packed tokens, once: prepared data is kept under the hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from aiether.data._bins import Bins, max_id, open_bins
from aiether.data._hash import file_hash, shares
from aiether.data._hub import PREFIX, hub_source
from aiether.data._pack import encode, start_of, write_tokens
from aiether.data._scan import DOCUMENT_PIECE_SIZE, scan
from aiether.data._work import WorkFolder
from aiether.data.config import DataConfig
from aiether.data.packed import PackedData
from aiether.data.sources import Source, find_source
from aiether.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_hash, train_tokenizer
from aiether.data.tokens import TokenFile, token_dtype

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it done so far, 0 to 1."""

_FORMAT = 1  # raise it when the same input would give other tokens
_DECODED_AT_ONCE = 1 << 20


def silent(phase: str, fraction: float) -> None:
    """Report to nobody."""


def prepare_source(dataset_path: str | None, config: DataConfig, progress: Progress) -> PackedData:
    """The packed tokens of one source, from the cache or made now; see `prepare`."""
    source = open_source(dataset_path, config, progress)
    content = source.content_hash(lambda fraction: progress("hashing", fraction))
    folder = config.cache_root / "data" / _cache_key(config, content)
    if not is_complete(folder):
        make_writable(folder.parent)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not is_complete(folder):
                _prepare_folder(config, source, content, folder, progress)
    return _load(folder, source)


def open_source(dataset_path: str | None, config: DataConfig, progress: Progress) -> Source | Bins:
    """What one `dataset_path` names. Raises ValueError when it is missing or holds nothing to read."""
    if dataset_path is not None and dataset_path.startswith(PREFIX):
        return hub_source(dataset_path, config, progress)
    if dataset_path is not None and (bins := open_bins(Path(dataset_path).expanduser(), config)):
        return bins
    return find_source(dataset_path, config)


def make_writable(folder: Path) -> None:
    """Make a folder of the cache. Raises ValueError when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"prepared data cannot be kept in {folder} ({error.strerror}); "
            "give a writable folder with cache_dir"
        ) from error


def _cache_key(config: DataConfig, content: str) -> str:
    tokenizer = f"bpe {config.vocab_size}" if config.tokenizer is None else tokenizer_hash(config.tokenizer)
    parts = (str(_FORMAT), content, tokenizer, repr(config.validation_fraction))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def is_complete(folder: Path) -> bool:
    """Whether a folder holds prepared data, every file as long as it was when it was written."""
    if not (folder / "data.json").is_file():
        return False
    files: dict[str, int] = read_record(folder)["files"]
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "data.json").read_text(encoding="utf-8"))


def _load(folder: Path, source: Source | Bins) -> PackedData:
    record = read_record(folder)
    dtype = token_dtype(record["vocab_size"])
    if isinstance(source, Bins):
        train, validation = source.train, source.validation
    else:
        train, validation = (TokenFile(folder / f"{name}.bin", dtype) for name in ("train", "validation"))
    nbytes = record["validation_bytes"]
    return PackedData(
        train=train,
        validation=validation,
        tokenizer_dir=folder / "tokenizer" if record["eos_token_id"] is not None else None,
        source=source.description,
        bytes_per_token=nbytes / len(validation) if nbytes is not None and len(validation) else None,
        **{key: record[key] for key in ("vocab_size", "eos_token_id", "fingerprint", "num_documents")},
        **{key: record[key] for key in ("train_bytes", "validation_bytes")},
    )


def _prepare_folder(
    config: DataConfig, source: Source | Bins, content: str, folder: Path, progress: Progress
) -> None:
    """Make the prepared folder beside its place, then move it there. The caller holds the lock.

    What is unfinished stays when the process ends, and the next one goes on with it. Only data that cannot
    be used (a ValueError) takes it away: it would fail again.
    """
    work = WorkFolder(folder.with_name(f"{folder.name}.part"))
    try:
        if isinstance(source, Bins):
            record = _check_bins(config, source, work.out, progress)
        else:
            record = _write_out(config, source, work, progress)
    except ValueError:
        shutil.rmtree(work.folder)
        raise
    except OSError as error:  # of writing: what goes wrong in reading is a ValueError by now
        raise OSError(
            error.errno,
            f"{error.strerror or error}: prepared data is kept in {folder.parent}; free space there or name "
            "another cache_dir; started again, the preparation goes on where it was",
        ) from error
    extra = b"" if not isinstance(source, Bins) else content.encode()
    write_record(work.out, record, extra, lambda fraction: progress("hashing", fraction))
    if folder.exists():  # incomplete, or this function would not have been called
        shutil.rmtree(folder)
    os.replace(work.out, folder)
    shutil.rmtree(work.folder)


def _write_out(config: DataConfig, source: Source, work: WorkFolder, progress: Progress) -> dict[str, Any]:
    given = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    trains = given is None and not source.is_tokenised
    found = work.read_scan()
    if found is None:
        found = scan(source, trains, lambda fraction: progress("reading", fraction))
        if not found.documents.keys:
            raise ValueError(f"{source.description} is empty; give a source that holds text")
        held_out = found.validation(config.validation_fraction)
        if trains:
            progress("training the tokenizer", 0.0)
            given = train_tokenizer(found.training_sample(held_out), config.vocab_size)
            progress("training the tokenizer", 1.0)
        if given is not None:
            shutil.rmtree(work.out / "tokenizer", ignore_errors=True)
            given.save(work.out / "tokenizer")
        work.write_scan(found)
    elif trains:
        given = load_tokenizer(str(work.out / "tokenizer"))
    held_out = found.validation(config.validation_fraction)
    vocab_size = found.max_id + 1 if given is None else given.vocab_size
    # Ids of a tokenised dataset are taken as they are: whoever made them placed the separators.
    separator = None if given is None or source.is_tokenised else given.eos_token_id
    pieces = found.read(source, DOCUMENT_PIECE_SIZE, lambda fraction: progress("tokenising", fraction))
    rest = islice(pieces, start_of(work, vocab_size).pieces, None)
    train_bytes, validation_bytes = write_tokens(work, encode(rest, given), held_out, vocab_size, separator)
    return {
        "vocab_size": vocab_size,
        "eos_token_id": None if given is None else given.eos_token_id,
        "num_documents": len(found.documents.keys),
        "train_bytes": train_bytes,
        "validation_bytes": validation_bytes,
    }


def _check_bins(config: DataConfig, bins: Bins, folder: Path, progress: Progress) -> dict[str, Any]:
    """The record of tokens that are used in place, once every id is known to be in the vocabulary."""
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    highest = max_id(bins, lambda fraction: progress("checking the ids", fraction))
    if tokenizer is not None:
        if highest >= tokenizer.vocab_size:
            raise ValueError(
                f"{bins.description} holds token id {highest}, the tokenizer's vocabulary has "
                f"{tokenizer.vocab_size} entries; give the tokenizer that made the ids, or the right "
                "token_dtype"
            )
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        tokenizer.save(folder / "tokenizer")
    return {
        "vocab_size": highest + 1 if tokenizer is None else tokenizer.vocab_size,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_token_id,
        "num_documents": None,
        "train_bytes": None,
        "validation_bytes": None if tokenizer is None else decoded_bytes(tokenizer, bins.validation),
    }


def decoded_bytes(tokenizer: TextTokenizer, tokens: TokenFile) -> int:
    """Bytes behind tokens, decoded in stretches: a character cut in two counts a few bytes too many."""
    return sum(
        tokenizer.decoded_bytes(tokens[start : start + _DECODED_AT_ONCE].tolist())
        for start in range(0, len(tokens), _DECODED_AT_ONCE)
    )


def write_record(
    folder: Path, record: dict[str, Any], extra: bytes, on_read: Callable[[float], None]
) -> None:
    """Write data.json: the record, the size of every file and their common hash; all reach the disk.

    `extra` is hashed with them: what stands for tokens that lie elsewhere.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "data.json")
    digest, on_bytes = hashlib.sha256(extra), shares(files, on_read)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file_hash(file, on_bytes))
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
