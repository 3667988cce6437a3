"""The second pass over a source: sections to token ids, side by side in two files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aiether.data.sources import Ids, Section
from aiether.data.tokenizer import TextTokenizer
from aiether.data.tokens import TokenWriter

SIDES = ("train", "validation")
_BATCH_CHARACTERS = 1 << 20


class Encoded(NamedTuple):
    """Token ids of one section; `nbytes` of text, None where the text is not known."""

    unit: int
    ids: Sequence[int] | Ids
    nbytes: int | None
    last: bool


@dataclass
class _Side:
    writer: TokenWriter
    nbytes: int | None = 0

    def write(self, item: Encoded) -> None:
        self.writer.write(item.ids)
        self.nbytes = None if self.nbytes is None or item.nbytes is None else self.nbytes + item.nbytes


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


def write_tokens(
    folder: Path, items: Iterable[Encoded], held_out: list[bool], vocab_size: int, separator: int | None
) -> tuple[int | None, int | None]:
    """Write train.bin and validation.bin; return the bytes of text behind each, None where unknown.

    `separator` is written where a document ends, and where it goes on in the other file.
    """
    with ExitStack() as stack:
        sides = [
            _Side(stack.enter_context(TokenWriter(folder / f"{name}.bin", vocab_size))) for name in SIDES
        ]
        end = [] if separator is None else [separator]
        open_side: _Side | None = None  # the side that holds the unfinished document
        for item in items:
            side = sides[held_out[item.unit]]
            if open_side is not None and open_side is not side:
                open_side.writer.write(end)
            side.write(item)
            if item.last:
                side.writer.write(end)
            open_side = None if item.last else side
    return sides[0].nbytes, sides[1].nbytes
