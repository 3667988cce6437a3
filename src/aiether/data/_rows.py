"""Files of rows (JSON Lines, CSV, TSV, Parquet) as a stream of texts, one row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path

from aiether.data._text import clear_errors, open_bytes

ROW_LIMIT = 1 << 28
"""Bytes of a row at most: a row is held in memory whole, a file is not."""
_BATCH = 256

Row = tuple[str, float]
"""The text of a row, and the share of the file read so far."""


def read_jsonl(path: Path, column: str) -> Iterator[Row]:
    """The texts of a JSON Lines file, one object a line; blank lines are skipped.

    Raises ValueError naming file and line for what is no JSON object with a text in `column`.
    """
    total = max(1, path.stat().st_size)
    with clear_errors(path):
        stream, raw = open_bytes(path)
        with raw, stream:
            number = 0
            while line := stream.readline(ROW_LIMIT + 1):
                number += 1
                if len(line) > ROW_LIMIT:
                    raise ValueError(_too_long(path, number))
                if line := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                    yield _json_text(line, path, number, column), raw.tell() / total


def _json_text(line: bytes, path: Path, number: int, column: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number} of {path} is not JSON ({error.msg} at character {error.pos}); needed is one "
            'object a line, such as {"text": "..."}; repair or remove the line (a JSON array becomes JSON '
            "Lines with `jq -c '.[]'`)"
        ) from error
    except RecursionError as error:
        raise ValueError(f"line {number} of {path} is nested too deeply; remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"line {number} of {path} is a JSON {type(row).__name__}; needed is one object a line, such as "
            '{"text": "..."}; a JSON array becomes JSON Lines with `jq -c \'.[]\'`'
        )
    if column not in row:
        raise ValueError(no_column(f"line {number} of {path}", column, list(row)))
    return row_text(row[column], f"line {number} of {path}", column)


def read_csv(path: Path, column: str, delimiter: str) -> Iterator[Row]:
    """The texts of a file of separated values; line one names the columns, quoted fields may span lines.

    Raises ValueError naming file and line for a missing column or a row of another length.
    """
    total = max(1, path.stat().st_size)
    csv.field_size_limit(max(ROW_LIMIT, csv.field_size_limit()))
    with clear_errors(path):
        stream, raw = open_bytes(path)
        with raw, stream, TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            try:
                header = next(rows, [])
                if header and column not in header:
                    raise ValueError(no_column(str(path), column, header))
                for row in rows:
                    if row:
                        yield _field(row, header, column, path, rows.line_num), raw.tell() / total
            except csv.Error as error:
                raise ValueError(
                    f"line {rows.line_num} of {path} cannot be read ({error}); quote fields that hold "
                    "quotes, newlines or separators, and double a quote inside them"
                ) from error


def _field(row: list[str], header: list[str], column: str, path: Path, number: int) -> str:
    if len(row) != len(header):
        raise ValueError(
            f"line {number} of {path} has {len(row)} fields, its first line names {len(header)} columns; "
            "quote fields that hold separators, or write the file again"
        )
    return row[header.index(column)]


def read_parquet(path: Path, column: str) -> Iterator[Row]:
    """The texts of a Parquet file, read by batches of rows; only `column` is read.

    Raises ValueError naming the file for one that is damaged or lacks the column.
    """
    import pyarrow as pa  # heavy, and needed for this kind alone
    import pyarrow.parquet as pq

    try:
        # Without pre-buffering and with a buffered stream a row group is read page by page.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(no_column(str(path), column, file.schema_arrow.names))
            total, done = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(_BATCH, columns=[column], use_threads=False):
                batch.validate(full=True)  # a damaged page can hold lengths that lead outside of it
                for value in batch.column(0):
                    done += 1
                    yield row_text(value.as_py(), f"row {done} of {path}", column), done / total
    except (pa.ArrowException, OSError, SystemError, UnicodeDecodeError) as error:  # seen on damaged files
        raise ValueError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); download or write it again"
        ) from error


def row_text(value: object, place: str, column: str) -> str:
    """A row's value if it is a text; half surrogate pairs, which JSON can spell, become U+FFFD."""
    if isinstance(value, str):
        return _mended(value)
    raise ValueError(
        f"{place} holds {type(value).__name__} in column {column!r}, text is needed; "
        "filter the data or name another text_column"
    )


def _mended(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def no_column(place: str, column: str, columns: list[str]) -> str:
    """What to say where the text column is missing: the columns there are."""
    shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    return (
        f"{place} has the columns {shown or '(none)'} and no text_column {column!r}; "
        "name the column of the text with text_column"
    )


def _too_long(path: Path, number: int) -> str:
    return (
        f"line {number} of {path} is longer than {ROW_LIMIT >> 20} MB, the most that a row may have; needed "
        "is one object a line (a JSON array becomes JSON Lines with `jq -c '.[]'`)"
    )


ROW_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": lambda path, column: read_csv(path, column, ","),
    ".tsv": lambda path, column: read_csv(path, column, "\t"),
    ".parquet": read_parquet,
}
"""By the suffix of a file's name, without that of its compression."""
