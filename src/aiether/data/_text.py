"""Text files, compressed or not, as a stream of pieces of documents."""

from __future__ import annotations

import gzip
import lzma
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
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
_CORRUPT = (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError)


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


def read_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the lines of a UTF-8 text file, newlines as "\\n", and the bytes read of the file so far.

    A line longer than LINE_LIMIT characters comes in several parts, so that memory stays bounded.
    Raises ValueError for a file that is missing, corrupt, binary or not UTF-8.
    """
    with clear_errors(path):
        stream, raw = open_bytes(path)
        with raw, stream, TextIOWrapper(stream, encoding="utf-8-sig") as text:
            while line := text.readline(LINE_LIMIT):
                if "\0" in line:
                    raise ValueError(
                        f"{path} is a binary file (it holds NUL bytes); allowed is UTF-8 text, plain or "
                        f"{', '.join(COMPRESSION_SUFFIXES)}; point dataset_path at text files"
                    )
                yield line, raw.tell()


def split_documents(lines: Iterable[str], limit: int) -> Iterator[Piece]:
    """Cut lines into pieces: documents end at a line that holds only <|endoftext|>, and with the lines.

    A document comes in pieces of about `limit` characters, cut after a blank line where there is one
    before twice that size, else after any line. The pieces of a document join to exactly its text;
    documents without a printed character are dropped.
    """
    held: str | None = None
    for chunk in _chunks(lines, limit):
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


def _chunks(lines: Iterable[str], limit: int) -> Iterator[str | None]:
    """Chunks of about `limit` characters, and None after each document that holds any text.

    The first chunk of a document always holds a printed character; later ones may be blank or empty.
    """
    parts: list[str] = []
    size, printed, at_line_start = 0, False, True
    for line in lines:
        if at_line_start and line.strip() == END_OF_TEXT:
            if printed:
                yield "".join(parts)
                yield None
            parts, size, printed = [], 0, False
            continue
        at_line_start = line.endswith("\n")
        parts.append(line)
        size += len(line)
        printed = printed or not line.isspace()
        if printed and size >= limit and (line == "\n" or size >= 2 * limit):
            yield "".join(parts)
            parts, size = [], 0
    if printed:
        yield "".join(parts)
        yield None
