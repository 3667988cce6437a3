from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from aiether.data import _rows
from aiether.data.config import DataConfig
from aiether.data.sources import find_source

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def write_rows(path: Path, texts: list[str], column: str = "text") -> Path:
    """A file of rows of the kind that its suffix tells, with a second column before the text."""
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table({"n": range(len(texts)), column: texts}), path, row_group_size=7)
        case ".csv" | ".tsv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
                writer.writerows([("n", column), *enumerate(texts)])
        case _:
            lines = [json.dumps({"n": n, column: text}) + "\n" for n, text in enumerate(texts)]
            path.write_text("".join(lines), encoding="utf-8")
    return path


def texts_of(path: Path | str, column: str = "text") -> list[str]:
    source = find_source(str(path), DataConfig(text_column=column))
    whole, documents = "", []
    for section in source.sections(1 << 12, lambda _: None):
        whole += str(section.content)
        if section.last:
            documents.append(whole)
            whole = ""
    return documents


KINDS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_a_document_whatever_it_holds(tmp_path: Path, kind: str, documents: list[str]) -> None:
    special = ['quotes " and, commas\tand tabs', "two\n\nparagraphs", "grüße Ω 𝄞", "long " * 10_000]
    path = write_rows(tmp_path / f"a{kind}", [*documents, *special, " ", ""], column="body")
    assert texts_of(path, column="body") == [*documents, *special]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".parquet"])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_rows_read_the_same(tmp_path: Path, kind: str, suffix: str, documents: list[str]) -> None:
    plain = write_rows(tmp_path / f"plain{kind}", documents).read_bytes()
    (tmp_path / f"a{kind}{suffix}").write_bytes(COMPRESSIONS[suffix](plain))
    assert texts_of(tmp_path / f"a{kind}{suffix}") == documents


def test_a_folder_may_mix_kinds(tmp_path: Path, documents: list[str]) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, kind in enumerate([".jsonl", ".csv", ".tsv", ".parquet"]):
        write_rows(folder / f"{number}{kind}", documents[10 * number : 10 * number + 10])
    (folder / "4.txt.gz").write_bytes(gzip.compress("<|endoftext|>\n".join(documents[40:]).encode()))
    (folder / "settings.json").write_text("{}")
    assert texts_of(folder) == documents


def test_progress_follows_the_rows_and_ends_at_one(tmp_path: Path, documents: list[str]) -> None:
    for kind in (".jsonl", ".csv", ".parquet"):
        shares: list[float] = []
        source = find_source(str(write_rows(tmp_path / f"a{kind}", documents)), DataConfig())
        list(source.sections(1000, shares.append))
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=8))
def test_any_text_passes_through_json_and_csv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for kind in (".jsonl", ".csv", ".parquet"):
        read = {".jsonl": _rows.read_jsonl, ".parquet": _rows.read_parquet}.get(
            kind, lambda path, column: _rows.read_csv(path, column, ",")
        )
        assert [text for text, _ in read(write_rows(folder / f"a{kind}", rows), "text")] == rows


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud834\\udd1e"}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["a�b 𝄞"]


def test_the_column_is_part_of_the_content(tmp_path: Path, documents: list[str]) -> None:
    rows = [{"title": text[:20], "text": text} for text in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hashes = {
        find_source(str(tmp_path / "a.jsonl"), DataConfig(text_column=column)).content_hash(lambda _: None)
        for column in ("title", "text")
    }
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 of .* is not JSON .*repair or remove the line"),
        ("a.jsonl", b'\n{"text": "a"}\n[1]\n', "line 3 of .* is a JSON list; needed is one object a line"),
        ("a.json", b'[\n{"text": "a"}\n]\n', r"line 1 of .* is not JSON .*jq -c"),
        (
            "a.jsonl",
            b'{"body": "a", "n": 1}\n',
            "line 1 of .* columns body, n and no text_column 'text'",
        ),
        ("a.jsonl", b'{"text": null}\n', "line 1 of .* holds NoneType in column 'text'"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8 text .*iconv"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is (nested too deeply|not JSON)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be decompressed"),
        ("a.csv", b"body,n\na,1\n", "has the columns body, n and no text_column 'text'"),
        ("a.csv", b"text,n\na,1\nb,2,3\n", "line 3 of .* has 3 fields, its first line names 2 columns"),
        ("a.csv", b'text\n"a\nb\n', "line 3 of .* cannot be read .*quote fields"),
        ("a.csv", b"text\ncaf\xe9\n", "not UTF-8 text"),
        ("a.parquet", b"no parquet at all", "cannot be read as Parquet"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_or_with_a_gap_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", ["a", "b"], column="body")
    with pytest.raises(ValueError, match=r"a\.parquet has the columns n, body and no text_column 'text'"):
        texts_of(path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"row 2 of .* holds NoneType in column 'text'"):
        texts_of(path)
    pq.write_table(pa.table({"text": ["word " * 50_000]}), path, compression="none")
    path.write_bytes(path.read_bytes()[:50_000] + bytes(20_000) + path.read_bytes()[70_000:])
    if texts_of_or_error(path) == ["word " * 50_000]:
        pytest.fail("a damaged page was read as if it were whole")


def test_a_parquet_file_with_spoiled_bytes_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for seed in range(1000):
        draw = random.Random(seed)
        compression, dictionary = draw.choice(["none", "snappy"]), draw.choice([True, False])
        texts = ["w" * draw.randrange(1, 40) for _ in range(draw.randrange(2, 40))]
        pq.write_table(pa.table({"text": texts}), path, compression=compression, use_dictionary=dictionary)
        content = bytearray(path.read_bytes())
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        texts_of_or_error(path)  # anything but ValueError fails


def texts_of_or_error(path: Path) -> list[str] | str:
    try:
        return texts_of(path)
    except ValueError as error:
        return str(error)


def test_a_row_that_does_not_fit_is_refused_instead_of_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rows, "ROW_LIMIT", 1000)
    (tmp_path / "a.json").write_text("[" + ", ".join(['{"text": "a"}'] * 500) + "]")
    with pytest.raises(ValueError, match=r"line 1 of .* is longer than .*jq -c"):
        texts_of(tmp_path / "a.json")
