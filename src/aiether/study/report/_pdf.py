"""A figure as PDF, with its legend inside it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from aiether.training.report.axes import legend_lines
from aiether.training.report.theme import LEGEND_LINE, LegendEntry, Picture, legend_columns

_FONT_SIZE = 9.5


def to_pdf(picture: Picture) -> bytes:
    """The picture, drawn before as SVG, as PDF without a date: equal pictures give equal bytes.

    It changes the figure: a page has its legend in its own text, a file has none, so that one comes below.
    """
    _add_legend(picture.figure, picture.legend)
    buffer = io.BytesIO()
    picture.figure.set_canvas(FigureCanvasPdf(picture.figure))
    nothing = {"CreationDate": None, "Creator": None, "Producer": None}
    picture.figure.savefig(buffer, format="pdf", metadata=nothing)
    return buffer.getvalue()


def _add_legend(figure: Figure, entries: Sequence[LegendEntry]) -> None:
    """Room below for the lines of the legend; what was laid out before stays where it is."""
    figure.set_layout_engine("none")
    columns = legend_columns(entries)
    width, height = figure.get_size_inches()
    room = (-(-len(entries) // columns) * LEGEND_LINE + 12) / 72
    whole = height + room
    for axes in figure.axes:
        box = axes.get_position()
        axes.set_position((box.x0, (box.y0 * height + room) / whole, box.width, box.height * height / whole))
    figure.set_size_inches(width, whole)
    lines = legend_lines(entries)
    legend = figure.legend(
        lines, [""] * len(lines), loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=columns, frameon=False,
        handlelength=2.6, fontsize=_FONT_SIZE, labelspacing=LEGEND_LINE / _FONT_SIZE - 1.0, borderpad=0.3,
    )  # fmt: skip
    for text, entry in zip(legend.get_texts(), entries, strict=True):
        text.set_text(entry.label)  # matplotlib itself leaves out labels with an underscore in front
