"""How each condition is drawn: the same colour, dash and point in every figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiether.study.report._results import Study
from aiether.training.report.axes import DASHES, MARKERS
from aiether.training.report.theme import ARM_DASHES, LIGHT, LegendEntry

_SHAPES = {"line": "disc", "dash": "square", "dot-dash": "triangle", "dots": "diamond"}


@dataclass(frozen=True)
class Style:
    """`role` names the colour, `mark` the dash of lines and `shape` the form of points."""

    role: str
    mark: str
    shape: str

    @property
    def colour(self) -> str:
        return LIGHT[self.role]

    @property
    def dashes(self) -> object:
        return DASHES[self.mark]

    @property
    def marker(self) -> str:
        return MARKERS[self.shape]

    def line(self, label: str) -> LegendEntry:
        return LegendEntry(label, self.role, self.mark)

    def point(self, label: str) -> LegendEntry:
        return LegendEntry(label, self.role, self.shape)


def styles_of(study: Study) -> Mapping[str, Style]:
    """A style for each condition, the baseline's first; after ten the colours return with other dashes."""
    return {name: _style(index) for index, name in enumerate(study.conditions)}


def _style(index: int) -> Style:
    marks = list(_SHAPES)
    round_, place = divmod(index, len(ARM_DASHES))
    mark = marks[(marks.index(ARM_DASHES[place]) + round_) % len(marks)]
    return Style(f"arm{place}", mark, _SHAPES[mark])
