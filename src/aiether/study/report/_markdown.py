"""The tables of a study in GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aiether.study.report import _tables as tables
from aiether.study.report import _words as words
from aiether.study.report._results import Study, parse_results
from aiether.study.report._sections import sections
from aiether.study.report._tables import Table
from aiether.training.report.markdown import code, markdown_table, plain
from aiether.training.report.tables import settings


def markdown_tables(results: Mapping[str, Any]) -> str:
    """Verdicts and tables of the content of a `results.json`, as Markdown; every text is escaped.

    Raises:
        ValueError: Something in `results` is missing or of another kind; the message names it.
    """
    return markdown_of(parse_results(dict(results)))


def markdown_of(study: Study) -> str:
    return "\n\n".join(part for part in _parts(study) if part) + "\n"


def _parts(study: Study) -> Iterator[str]:
    yield f"# {_line(study.name)}"
    yield _line(study.question)
    yield from map(_line, words.notices(study))
    yield "## Verdicts"
    for found in words.findings(study):
        yield f"### {found.title}"
        yield "\n".join(
            f"- **{_line(each.about)}**: {_line(said)}" for each in found.verdicts for said in each.sentences
        )
        yield found.note
    for section in sections(study, {}):
        yield f"## {section.title}"
        for table in section.tables:
            yield from _table(table, section.title)
    yield "## How it was measured"
    yield _pairs(tables.measured(study))
    yield "## Environment"
    yield _pairs(settings(study.environment))
    yield f"Run it again: {code(study.command)}" if study.command else ""


def _table(table: Table, section: str) -> Iterator[str]:
    if table.title != section:
        yield f"### {_line(table.title)}"
    yield markdown_table([*map(_line, table.grid.columns)], [[*map(_line, row)] for row in table.grid.rows])
    yield _line(table.note)


def _pairs(pairs: tuple[tuple[str, str], ...]) -> str:
    return markdown_table(("", ""), [(_line(name), _line(value)) for name, value in pairs]) if pairs else ""


def _line(text: str) -> str:
    return plain(" ".join(text.split()))
