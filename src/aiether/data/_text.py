"""Text files, compressed or not, as a stream of pieces of documents."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase, TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

END_OF_TEXT = "<|endoftext|>"
LINE_LIMIT = 1 << 14
"""Characters of a part of a line: a longer line is cut into parts of this size, so that memory is bounded."""
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
_CORRUPT = (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError)
_BLOCK_CHARACTERS = 1 << 17
_PRINTED = re.compile(r"\S")


class Piece(NamedTuple):
    """A stretch of one document; `last` marks the document's end."""

    text: str
    last: bool


def open_bytes(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """The decompressed stream of a file and the raw one under it, whose position tells the progress."""
    raw = path.open("rb")
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw)), raw
        case ".xz":
            return cast(IO[bytes], lzma.LZMAFile(raw)), raw
        case ".zst":
            return cast(IO[bytes], BufferedReader(_ZstandardFrames(raw), 1 << 17)), raw
        case _:
            return raw, raw


class _ZstandardFrames(RawIOBase):
    """The content of a file of zstandard frames; a frame that breaks off is an error.

    zstandard's own stream reader takes a truncated file for a shorter one.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read(1 << 16)
            if not data:
                if self._started:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._started = True
            self._ready = memoryview(self._frame.decompress(data))
        target = memoryview(buffer)
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, as a ValueError that names it and says what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason}: byte 0x{error.object[error.start]:02x}); convert it, "
            "for instance with `iconv -f latin1 -t utf-8`, or leave it out"
        ) from error
    except _CORRUPT as error:
        raise ValueError(
            f"{path} cannot be decompressed ({error}); its suffix must tell its format and the file must be "
            "whole; download or compress it again"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); check path and rights"
        ) from error


def read_text(path: Path) -> Iterator[tuple[str, int]]:
    """Yield a UTF-8 text file in blocks, newlines as "\\n", and the bytes read of the file so far.

    Raises ValueError for a file that is missing, corrupt, binary or not UTF-8.
    """
    with clear_errors(path):
        stream, raw = open_bytes(path)
        with raw, stream, TextIOWrapper(stream, encoding="utf-8-sig") as text:
            while block := text.read(_BLOCK_CHARACTERS):
                if "\0" in block:
                    raise ValueError(
                        f"{path} is a binary file (it holds NUL bytes); allowed is UTF-8 text, plain or "
                        f"{', '.join(COMPRESSION_SUFFIXES)}; point dataset_path at text files"
                    )
                yield block, raw.tell()


def split_documents(blocks: Iterable[str], limit: int) -> Iterator[Piece]:
    """Cut a text into pieces: documents end at a line that holds only <|endoftext|>, and with the text.

    A document comes in pieces of about `limit` characters, cut after a blank line where there is one
    before twice that size, else after any line (or part of a line, of LINE_LIMIT characters). The pieces
    of a document join to exactly its text; documents without a printed character are dropped. How the
    text is divided into blocks changes nothing.
    """
    held: str | None = None
    for chunk in _chunks(blocks, limit):
        if chunk is None:
            if held is not None:
                yield Piece(held, True)
            held = None
        elif held is None:
            held = chunk
        elif not chunk or chunk.isspace():
            held += chunk  # white space is no piece of its own
        else:
            yield Piece(held, False)
            held = chunk


def _chunks(blocks: Iterable[str], limit: int) -> Iterator[str | None]:
    """Chunks of about `limit` characters, and None after each document that holds any text.

    The first chunk of a document always holds a printed character; later ones may be blank or empty.
    """
    cutter = _Cutter(limit)
    for run, ends_document in _runs(_stretches(blocks)):
        yield from cutter.add(run)
        if ends_document:
            yield from cutter.end()
    yield from cutter.end()


def _stretches(blocks: Iterable[str]) -> Iterator[str]:
    """The text in stretches of whole lines, at most LINE_LIMIT characters each.

    A line that is longer comes in parts of that size; its last part begins a stretch of lines.
    """
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start >= LINE_LIMIT:
            newline = text.rfind("\n", start, start + LINE_LIMIT)
            end = newline + 1 if newline >= 0 else start + LINE_LIMIT
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def _runs(stretches: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """What lies between the lines of <|endoftext|>, and whether one follows; such a line has one part."""
    at_line_start = True
    for text in stretches:
        begin = start = 0
        found = text.find(END_OF_TEXT)
        while found >= 0:
            line = text.rfind("\n", start, found) + 1 or start
            start = text.find("\n", found) + 1 or len(text)
            if (line or at_line_start) and text[line:start].strip() == END_OF_TEXT:
                yield text[begin:line], True
                begin, at_line_start = start, True
            found = text.find(END_OF_TEXT, start)
        if begin < len(text):
            yield text[begin:], False
            at_line_start = text.endswith("\n")


class _Cutter:
    """Cuts documents, which come in runs of whole lines or of one part of a line, into chunks."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[str] = []
        self._size = 0
        self._printed = False

    def add(self, run: str) -> Iterator[str]:
        """Take more of the document; yield the chunks that are full."""
        start = 0
        while (end := self._cut(run, start)) is not None:
            self._parts.append(run[start:end])
            yield "".join(self._parts)
            self._parts, self._size, start = [], 0, end
        self._parts.append(run[start:])
        self._size += len(run) - start

    def end(self) -> Iterator[str | None]:
        """The document ends: yield its last chunk and None, unless nothing in it is printed."""
        if self._printed:
            yield "".join(self._parts)
            yield None
        self._parts, self._size, self._printed = [], 0, False

    def _cut(self, run: str, start: int) -> int | None:
        """Where the chunk that goes on at `start` ends, if that is within the run."""
        first = start + self._limit - self._size
        last = first + self._limit
        if not self._printed:
            if (printed := _PRINTED.search(run, start)) is None:
                return None
            self._printed = True
            first, last = max(first, printed.end()), max(last, printed.end())
        if first > len(run):
            return None
        if first <= start + 1 and run.startswith("\n", start):  # what ends before it is another run
            return start + 1
        blank = run.find("\n\n", max(start, first - 2), last)
        if blank >= 0:
            return blank + 2
        return (run.find("\n", max(start, last - 1)) + 1 or len(run)) if last <= len(run) else None
