"""A text as one stretch of tokens, nothing held out: what a model is evaluated on."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from aiether.data._bins import open_whole
from aiether.data._hub import PREFIX, hub_source
from aiether.data._pack import encode
from aiether.data._scan import DOCUMENT_PIECE_SIZE
from aiether.data.config import DataConfig
from aiether.data.prepare import (
    Progress,
    decoded_bytes,
    is_complete,
    make_writable,
    read_record,
    silent,
    write_record,
)
from aiether.data.sources import Source, find_source
from aiether.data.tokenizer import TextTokenizer
from aiether.data.tokens import TokenFile, TokenWriter

_FORMAT = 1  # raise it when the same input would give other tokens
_ANY_ID = 1 << 32


@dataclass(frozen=True)
class WholeText:
    """All tokens of a source, each document followed by the end-of-text token.

    Attributes:
        tokens: memory-mapped.
        bytes_per_token: UTF-8 bytes of text that a token stands for; None where the text is not known.
        source: what the data is, for people.
    """

    tokens: TokenFile
    bytes_per_token: float | None
    source: str


def whole_text(
    config: DataConfig, tokenizer: TextTokenizer | None, progress: Progress | None = None
) -> WholeText:
    """The text that `config.dataset_path` names, in tokens of `tokenizer`, from the cache or made now.

    One source of any kind that training takes. Tokens are taken as they are; of a folder with train.bin and
    val.bin the latter. `config`'s own tokenizer and split are not looked at.

    Raises ValueError for several sources, what cannot be read or is empty, and text without a tokenizer.
    """
    config.validate()
    if len(config.dataset_paths) != 1:
        raise ValueError("dataset_path names several sources; evaluate them one by one")
    [path], report = config.dataset_paths, progress or silent
    if path is not None and path.startswith(PREFIX):
        return _from_source(config, hub_source(path, config, report), tokenizer, report)
    tokens = None if path is None else open_whole(Path(path).expanduser(), config)
    if tokens is not None:
        nbytes = None if tokenizer is None else decoded_bytes(tokenizer, tokens)
        return WholeText(tokens, _quotient(nbytes, len(tokens)), str(path))
    return _from_source(config, find_source(path, config), tokenizer, report)


def _from_source(
    config: DataConfig, source: Source, tokenizer: TextTokenizer | None, progress: Progress
) -> WholeText:
    if tokenizer is None and not source.is_tokenised:
        raise ValueError(
            f"{source.description} is text, and there is no tokenizer: name one with --tokenizer"
        )
    content = source.content_hash(lambda fraction: progress("hashing", fraction))
    folder = config.cache_root / "whole" / _cache_key(content, tokenizer)
    if not is_complete(folder):
        make_writable(folder.parent)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not is_complete(folder):
                _write(source, tokenizer, folder, progress)
    record = read_record(folder)
    tokens = TokenFile(folder / "text.bin", record["dtype"])
    return WholeText(tokens, _quotient(record["bytes"], len(tokens)), source.description)


def _cache_key(content: str, tokenizer: TextTokenizer | None) -> str:
    spelled = "" if tokenizer is None else tokenizer.backend.to_str() + tokenizer.eos_token
    return hashlib.sha256(f"{_FORMAT}\n{content}\n{spelled}".encode()).hexdigest()[:32]


def _write(source: Source, tokenizer: TextTokenizer | None, folder: Path, progress: Progress) -> None:
    """Make the folder beside its place, then move it there. The caller holds the lock."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    record = _encode_to(part / "text.bin", source, tokenizer, progress)
    write_record(part, record, b"", lambda fraction: progress("hashing", fraction))
    shutil.rmtree(folder, ignore_errors=True)  # incomplete, or this function would not have been called
    os.replace(part, folder)


def _encode_to(
    path: Path, source: Source, tokenizer: TextTokenizer | None, progress: Progress
) -> dict[str, Any]:
    sections = source.sections(DOCUMENT_PIECE_SIZE, lambda fraction: progress("tokenising", fraction))
    # Ids of a tokenised dataset are taken as they are: whoever made them placed the separators.
    separator = [] if tokenizer is None or source.is_tokenised else [tokenizer.eos_token_id]
    nbytes: int | None = 0
    with TokenWriter(path, _ANY_ID if tokenizer is None else tokenizer.vocab_size) as writer:
        for item in encode(((0, section) for section in sections), tokenizer):
            writer.write(item.ids)
            if item.last:
                writer.write(separator)
            nbytes = None if nbytes is None or item.nbytes is None else nbytes + item.nbytes
    if not writer.count:
        raise ValueError(f"{source.description} is empty; give a source that holds text")
    return {"dtype": writer.dtype.str, "bytes": nbytes}


def _quotient(nbytes: int | None, tokens: int) -> float | None:
    return nbytes / tokens if nbytes is not None and tokens else None
