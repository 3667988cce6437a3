"""The second pass over a source: sections to token ids, side by side in two files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aiether.data._work import Position, WorkFolder
from aiether.data.sources import Ids, Section
from aiether.data.tokenizer import TextTokenizer
from aiether.data.tokens import TokenWriter, token_dtype

SIDES = ("train", "validation")
COMMIT_TOKENS = 1 << 21
"""Tokens after which the position is kept: some seconds of work."""
_BATCH_CHARACTERS = 1 << 20
Held = Sequence[bool] | npt.NDArray[np.bool_]


class Encoded(NamedTuple):
    """Token ids of one section; `nbytes` of text, None where the text is not known."""

    unit: int
    ids: Sequence[int] | Ids
    nbytes: int | None
    last: bool


def encode(pieces: Iterable[tuple[int, Section]], tokenizer: TextTokenizer | None) -> Iterator[Encoded]:
    """Sections as token ids, text encoded in batches; ids pass through as they are."""
    batch: list[tuple[int, Section]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1].content)
        if size >= _BATCH_CHARACTERS:
            yield from _encode_batch(batch, tokenizer)
            batch, size = [], 0
    yield from _encode_batch(batch, tokenizer)


def _encode_batch(batch: list[tuple[int, Section]], tokenizer: TextTokenizer | None) -> Iterator[Encoded]:
    texts = [section.content for _, section in batch if isinstance(section.content, str)]
    encoded = iter(tokenizer.encode(texts)) if tokenizer is not None and texts else iter(())
    for unit, section in batch:
        if isinstance(section.content, str):
            yield Encoded(unit, next(encoded), len(section.content.encode()), section.last)
        else:
            nbytes = None if tokenizer is None else tokenizer.decoded_bytes(section.content.tolist())
            yield Encoded(unit, section.content, nbytes, section.last)


@dataclass
class _Sides:
    """The two files, the bytes of text behind each, and which of them holds the unfinished document."""

    writers: list[TokenWriter]
    nbytes: list[int | None]
    open_side: int | None
    separator: list[int]

    def write(self, item: Encoded, side: int) -> None:
        """Append an item, and the separator where a document ends or goes on in the other file."""
        if self.open_side is not None and self.open_side != side:
            self.writers[self.open_side].write(self.separator)
        self.writers[side].write(item.ids)
        known = self.nbytes[side]
        self.nbytes[side] = None if known is None or item.nbytes is None else known + item.nbytes
        if item.last:
            self.writers[side].write(self.separator)
        self.open_side = None if item.last else side

    def sync(self, pieces: int) -> Position:
        """Have everything on the disk; return where that is."""
        for writer in self.writers:
            writer.sync()
        train, validation = self.writers
        return Position(
            pieces, (train.count, validation.count), (self.nbytes[0], self.nbytes[1]), self.open_side
        )


def start_of(work: WorkFolder, vocab_size: int) -> Position:
    """Where to go on: the position kept, or the start if a file holds less than was committed to it."""
    position, width = work.read_position(), token_dtype(vocab_size).itemsize
    for name, tokens in zip(SIDES, position.tokens, strict=True):
        path = work.out / f"{name}.bin"
        if tokens and (not path.is_file() or path.stat().st_size < tokens * width):
            return Position()
    return position


def write_tokens(
    work: WorkFolder,
    items: Iterable[Encoded],
    held_out: Held,
    vocab_size: int,
    separator: int | None,
) -> tuple[int | None, int | None]:
    """Write train.bin and validation.bin; return the bytes of text behind each, None where unknown.

    `items` begin where `work` says that the last try stopped. Every COMMIT_TOKENS tokens the files are
    synced and the position is kept, so that a kill costs the work since then and changes no token.
    """
    start = start_of(work, vocab_size)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TokenWriter(work.out / f"{name}.bin", vocab_size, count))
            for name, count in zip(SIDES, start.tokens, strict=True)
        ]
        sides = _Sides(writers, list(start.nbytes), start.open_side, [] if separator is None else [separator])
        uncommitted, pieces = 0, start.pieces
        for pieces, item in enumerate(items, start.pieces + 1):
            sides.write(item, int(held_out[item.unit]))
            uncommitted += len(item.ids)
            if uncommitted >= COMMIT_TOKENS:
                work.write_position(sides.sync(pieces))
                uncommitted = 0
        work.write_position(end := sides.sync(pieces))
    return end.nbytes
