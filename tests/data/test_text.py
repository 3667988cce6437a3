from __future__ import annotations

import gzip
import io
import lzma
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from aiether.data._text import END_OF_TEXT, LINE_LIMIT, Piece, read_text, split_documents


def pieces(text: str, limit: int) -> list[Piece]:
    return list(split_documents((text,), limit))


def joined(found: list[Piece]) -> list[str]:
    documents, current = [], ""
    for piece in found:
        current += piece.text
        if piece.last:
            documents.append(current)
            current = ""
    assert current == "", "the last piece must end its document"
    return documents


@given(st.lists(st.text(alphabet="ab<| \n", max_size=60)), st.integers(1, 40))
def test_pieces_join_to_the_documents_between_separators(documents: list[str], limit: int) -> None:
    documents = [document + "\n" for document in documents]
    text = f"{END_OF_TEXT}\n".join(documents)
    assert joined(pieces(text, limit)) == [document for document in documents if not document.isspace()]


@given(
    text=st.lists(
        st.sampled_from(
            [
                "a",
                "bc",
                " ",
                "\n",
                "\n\n",
                "\r",
                "\x1c",
                "\u2003",
                "xxxxxxxx",
                END_OF_TEXT,
                f"\n{END_OF_TEXT}\n",
            ]
        ),
        max_size=60,
    ).map("".join),
    limit=st.integers(1, 40),
    line_limit=st.integers(1, 24),
    cuts=st.lists(st.integers(0, 200)),
)
def test_pieces_are_those_of_reading_line_by_line_however_the_text_is_divided(
    text: str, limit: int, line_limit: int, cuts: list[int]
) -> None:
    places = [0, *sorted(cuts), len(text)]
    blocks = [text[start:end] for start, end in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiether.data._text.LINE_LIMIT", line_limit)
        found = list(split_documents(blocks, limit))
    assert found == pieces_line_by_line(text, limit, line_limit)


def pieces_line_by_line(text: str, limit: int, line_limit: int) -> list[Piece]:
    """The definition of the cuts, slowly: part of a line for part of a line."""
    found: list[Piece] = []
    chunks, parts, size, printed, at_line_start = [], [], 0, False, True

    def end_document() -> None:
        if printed:
            chunks.append("".join(parts))
            merged: list[str] = []
            for chunk in chunks:
                if merged and not chunk.strip():
                    merged[-1] += chunk
                else:
                    merged.append(chunk)
            found.extend(Piece(chunk, number == len(merged)) for number, chunk in enumerate(merged, 1))

    for line in iter(partial(io.StringIO(text, newline="\n").readline, line_limit), ""):
        if at_line_start and line.strip() == END_OF_TEXT:
            end_document()
            chunks, parts, size, printed = [], [], 0, False
            continue
        at_line_start = line.endswith("\n")
        parts.append(line)
        size += len(line)
        printed = printed or not line.isspace()
        if printed and size >= limit and (line == "\n" or size >= 2 * limit):
            chunks.append("".join(parts))
            parts, size = [], 0
    end_document()
    return found


def test_pieces_are_cut_at_blank_lines_and_never_grow_far_beyond_the_limit() -> None:
    text = "\n\n".join(f"paragraph {number} of some length" for number in range(200)) + "\n"
    found = pieces(text, 100)
    assert all(piece.text.endswith("\n\n") for piece in found[:-1])
    assert max(len(piece.text) for piece in found) <= 200


def test_text_in_one_line_is_cut_all_the_same() -> None:
    text = "word " * (2 * LINE_LIMIT)
    found = pieces(text, 50)
    assert joined(found) == [text]
    assert len(found) == 10


def test_separator_counts_only_as_a_whole_line() -> None:
    text = f"say {END_OF_TEXT} aloud\n{'x' * LINE_LIMIT}{END_OF_TEXT}\n"
    assert joined(pieces(text, 1000)) == [text]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", lambda data: data),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_every_compression_reads_the_same(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    text = "grüße\nΩ second line\n" * 500 + "x" * (LINE_LIMIT + 5)
    path = tmp_path / f"a.txt{suffix}"
    half = len(text) // 2  # two members, as parallel compressors write them
    path.write_bytes(compress(text[:half].encode()) + compress(text[half:].encode()))
    read = list(read_text(path))
    assert "".join(block for block, _ in read) == text
    assert read[-1][1] == path.stat().st_size


def test_byte_order_mark_and_windows_newlines_do_not_reach_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [block for block, _ in read_text(path)] == ["one\ntwo\n"]
    monkeypatch.setattr("aiether.data._text._BLOCK_CHARACTERS", 3)
    assert [block for block, _ in read_text(path)] == ["one", "\ntw", "o\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\0def", "binary"),
        ("a.txt", b"caf\xe9 au lait", r"not UTF-8 text .*0xe9.*iconv"),
        ("a.txt.gz", b"not gzip at all", "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"whole text " * 500, mtime=0)[:-20], "cannot be decompressed"),
        ("a.txt.xz", lzma.compress(b"whole text " * 500)[:-20], "cannot be decompressed"),
        ("a.txt.zst", b"not zstandard", "cannot be decompressed"),
        ("a.txt.zst", zstandard.compress(bytes(range(1, 120)) * 5)[:-20], "cannot be decompressed"),
        ("missing.txt", None, "cannot be read .*No such file"),
    ],
)
def test_unusable_files_are_named_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_text(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
