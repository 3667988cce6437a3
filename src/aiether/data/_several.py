"""Several sources as one: a tokenizer for all, each prepared by itself, mixed by shares of tokens."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from aiether.data._bins import Bins
from aiether.data._scan import SAMPLE_BYTES, scan
from aiether.data.config import DataConfig
from aiether.data.mixture import TokenMixture
from aiether.data.packed import PackedData
from aiether.data.prepare import Progress, make_writable, open_source, prepare_source
from aiether.data.sources import Source
from aiether.data.tokenizer import train_tokenizer
from aiether.data.tokens import TokenFile


def prepare_mixture(config: DataConfig, progress: Progress) -> PackedData:
    """The packed tokens of all sources of `config`, mixed by `dataset_weights`."""
    if config.tokenizer is None:
        config = _with_common_tokenizer(config, progress)
    parts = [prepare_source(path, config, progress) for path in config.dataset_paths]
    weights = config.dataset_weights or tuple(float(part.train_tokens) for part in parts)
    shares = tuple(weight / sum(weights) for weight in weights)
    known = [part.bytes_per_token for part in parts if part.bytes_per_token is not None]
    words = ", ".join(f"{share:.3g} of {part.source}" for share, part in zip(shares, parts, strict=True))
    return PackedData(
        train=TokenMixture(tuple(_named(part.train, part) for part in parts), shares),
        validation=TokenMixture(tuple(_named(part.validation, part) for part in parts), shares),
        tokenizer_dir=parts[0].tokenizer_dir,
        vocab_size=max(part.vocab_size for part in parts),
        eos_token_id=parts[0].eos_token_id,
        fingerprint=_fingerprint(parts, shares),
        source=words,
        num_documents=_total([part.num_documents for part in parts]),
        train_bytes=_total([part.train_bytes for part in parts]),
        validation_bytes=_total([part.validation_bytes for part in parts]),
        bytes_per_token=_weighted(shares, known) if len(known) == len(parts) else None,
    )


def _named(tokens: TokenFile | TokenMixture, part: PackedData) -> TokenFile:
    assert isinstance(tokens, TokenFile)
    return tokens.renamed(f"{tokens.name} ({part.source})")


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _weighted(shares: Sequence[float], values: Sequence[float]) -> float:
    return sum(share * value for share, value in zip(shares, values, strict=True))


def _fingerprint(parts: Sequence[PackedData], shares: Sequence[float]) -> str:
    words = [f"{part.fingerprint} {share!r}" for part, share in zip(parts, shares, strict=True)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _with_common_tokenizer(config: DataConfig, progress: Progress) -> DataConfig:
    """`config` with a tokenizer trained on samples of all its text sources; ids without one stay without."""
    sources = [open_source(path, config, progress) for path in config.dataset_paths]
    text = [source for source in sources if not isinstance(source, Bins) and not source.is_tokenised]
    if not text:
        return config
    if len(text) < len(sources):
        raise ValueError(
            f"dataset_path mixes text ({text[0].description}) and token ids; the ids need the tokenizer that "
            "made them, and the text must be encoded by the same; name it with tokenizer"
        )
    weights = config.dataset_weights or (1.0,) * len(text)
    shares = [weight / sum(weights) for weight in weights]
    folder = config.cache_root / "tokenizers" / _tokenizer_key(config, text, shares, progress)
    make_writable(folder.parent)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            _train(config, text, shares, folder, progress)
    return replace(config, tokenizer=str(folder))


def _tokenizer_key(
    config: DataConfig, sources: Sequence[Source], shares: Sequence[float], progress: Progress
) -> str:
    hashes = [source.content_hash(lambda fraction: progress("hashing", fraction)) for source in sources]
    words = [f"{content} {share!r}" for content, share in zip(hashes, shares, strict=True)]
    words += [str(config.vocab_size), repr(config.validation_fraction)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]


def _train(
    config: DataConfig, sources: Sequence[Source], shares: Sequence[float], folder: Path, progress: Progress
) -> None:
    texts: list[str] = []
    for source, share in zip(sources, shares, strict=True):
        found = scan(source, True, lambda fraction: progress("reading for the tokenizer", fraction))
        if not found.documents.keys:
            raise ValueError(f"{source.description} is empty; give a source that holds text")
        size = 0
        for section in found.training_sample(found.validation(config.validation_fraction)):
            if size >= share * SAMPLE_BYTES:
                break
            texts.append(section)
            size += len(section)
    progress("training the tokenizer", 0.0)
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    train_tokenizer(texts, config.vocab_size).save(temporary)
    os.replace(temporary, folder)
    progress("training the tokenizer", 1.0)
