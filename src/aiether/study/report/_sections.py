"""Which tables and figures stand together, in their order: the page and `tables.md` follow it alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aiether.study.report import _tables as tables
from aiether.study.report._results import Study
from aiether.study.report._tables import Table
from aiether.training.report.theme import Picture

Drawing = tuple[Picture, Markup]


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out."""

    title: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Drawing, ...] = ()


def sections(study: Study, drawn: Mapping[str, Sequence[Drawing]]) -> list[Section]:
    """Everything between the verdicts and the record, in order."""

    def section(title: str, part: str, *makers: Callable[[Study], Table]) -> Section:
        made = (make(study) for make in makers)
        kept = tuple(table for table in made if table.grid.rows)
        return Section(title, kept, tuple(drawn.get(part, ())))

    found = [
        section("Failed and missing runs", "", tables.failed_and_missing),
        section("Arms", "", tables.conditions, tables.what_each_arm_is, tables.what_came_out),
        section("Comparisons", "comparisons", tables.comparisons, tables.spread, tables.by_seed),
        section("Factors", "factors", tables.effects),
        section("Loss over training", "loss"),
        section("Loss and what it cost", "cost", tables.savings, tables.equal_cost),
        section("Speed and stability", "speed"),
        section("Growths", "", tables.growths),
        section("Learning rates", "", tables.tuning),
    ]
    return [each for each in found if each.figures or each.tables]
