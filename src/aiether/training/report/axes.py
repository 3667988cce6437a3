"""What all figures of a report have in common: one width, one way to label, one way to mark a growth.

All are drawn at 440 units of width: legible on a phone, and half of a desktop page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from aiether.training import _format as fmt
from aiether.training.report.run_records import Row, Run, as_number
from aiether.training.report.theme import LIGHT, LegendEntry

WIDTH = 440
DASHES: dict[str, Any] = {
    "line": "solid",
    "dash": (0, (4.5, 1.8)),
    "dot-dash": (0, (5, 2, 1, 2)),
    "dots": (0, (1, 1.8)),
}
MARKERS = {"disc": "o", "square": "s", "triangle": "^", "diamond": "D"}
BASELINE_STYLES = (("static", "dash", DASHES["dash"]), ("other", "dot-dash", DASHES["dot-dash"]))
GROWTH_ENTRY = LegendEntry("growth (layers before→after)", "growth", "dots")


def new_axes(height: float = 265, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of 440 by `height` units with `rows` panels above each other."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    panels = list(np.atleast_1d(figure.subplots(rows, 1, sharex=True)))
    for axes in panels:
        axes.patch.set_visible(False)
    return figure, panels


def style_axes(axes: Axes, y_label: str, x_label: str | None = "step", *, pad: float = 20) -> None:
    """The label of y stands above the axis, where it is read without turning the head, `pad` points away."""
    axes.set_title(y_label, loc="left", fontsize=10.5, color=LIGHT["muted"], pad=pad)
    exponent = _common_exponent(axes.get_xlim()[1])
    if x_label:
        axes.set_xlabel(f"{x_label}, {fmt.power_of_ten(exponent)}" if exponent else x_label)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value / 10**exponent)))


def _common_exponent(largest: float) -> int:
    """The power of ten that all ticks of an axis share; 0 while plain numbers are short enough."""
    return math.floor(math.log10(largest)) if largest >= 1e7 else 0


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def legend_lines(entries: Iterable[LegendEntry]) -> list[Line2D]:
    """Handles for matplotlib's own legend, where there is no page to write one in."""
    return [_handle(entry) for entry in entries]


def _handle(entry: LegendEntry) -> Line2D:
    colour = LIGHT[entry.role]
    if entry.mark in MARKERS:
        marker = MARKERS[entry.mark]
        return Line2D([], [], color=colour, linestyle="none", marker=marker, markersize=6, label=entry.label)
    dashes, width = DASHES.get(entry.mark, "solid"), 4.0 if entry.mark == "bar" else None
    return Line2D([], [], color=colour, linestyle=dashes, linewidth=width, label=entry.label)


def time_unit(longest_s: float) -> tuple[float, str]:
    """What seconds are divided by, and its name: time is read in minutes or hours, not in 10⁴ seconds."""
    if longest_s < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest_s < 3 * 3600 else (3600.0, "hours")


def mark_growths(axes: Axes, run: Run, positions: Sequence[float], panel: int = 0) -> dict[str, str]:
    """A dotted line at each growth, with the depths above the first panel where there is room for them.

    Returns the tool tips by gid. Call it when the limits of x stand.
    """
    low, high = axes.get_xlim()
    tips: dict[str, str] = {}
    free_from = -math.inf
    width = 1.2 if len(run.growths) <= 6 else 0.7
    for index, (event, x) in enumerate(zip(run.growths, positions, strict=True)):
        if not math.isfinite(x):
            continue
        gid = f"growth{panel}-{index}"
        line = axes.axvline(x, color=LIGHT["growth"], linewidth=width, linestyle=(0, (1, 1.8)), zorder=1.5)
        line.set_gid(gid)
        tips[gid] = growth_words(event)
        text = depths(event)
        half = (high - low) * (0.010 + 0.0085 * len(text))
        if panel == 0 and x - half >= free_from:
            style = {"fontsize": 9.5, "color": LIGHT["growth"], "ha": "center", "va": "bottom"}
            axes.text(x, 1.012, text, transform=axes.get_xaxis_transform(), **style)
            free_from = x + half
    return tips


def depths(event: Row) -> str:
    """2→4."""
    return f"{event.get('depth_before', '?')}→{event.get('depth_after', '?')}"


def growth_words(event: Row) -> str:
    """One sentence on a growth, for tool tips."""
    before, after = as_number(event.get("loss_before")), as_number(event.get("loss_after"))
    losses = f", loss {before:.3f} → {after:.3f}" if math.isfinite(before) and math.isfinite(after) else ""
    return f"Step {int(event['step']):,}: {depths(event)} layers{losses}"
