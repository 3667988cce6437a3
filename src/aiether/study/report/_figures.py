"""Curves of a study: loss over all that it costs, throughput and gradient norm, with bands over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from aiether.study.report import _words as words
from aiether.study.report._curves import Band, Record, band_of, growth_marks, loss_curves, train_curves
from aiether.study.report._results import Arm, Study
from aiether.study.report._styles import Style, styles_of
from aiether.training import _format as fmt
from aiether.training.report.axes import new_axes, style_axes, time_unit
from aiether.training.report.series import frame
from aiether.training.report.theme import LIGHT, LegendEntry, Picture

Records = Mapping[int, Sequence[Record]]
GROWTH = LegendEntry("layers added", "muted", "triangle")


@dataclass(frozen=True)
class Line:
    """An arm as it is drawn: `full` at the length that is compared, fainter at others."""

    arm: Arm
    records: Sequence[Record]
    style: Style
    full: bool


@dataclass(frozen=True)
class LossFigure:
    key: str
    title: str
    x: str
    x_label: str
    caption: str


LOSS_FIGURES = (
    LossFigure("loss-steps", "Loss against steps", "step", "step", "A step costs more the deeper the model."),
    LossFigure(
        "loss-tokens",
        "Loss against tokens",
        "tokens",
        "training tokens",
        "What was read to get there, whatever the model's size.",
    ),
    LossFigure(
        "loss-flops",
        "Loss against FLOPs",
        "flops",
        "training FLOPs",
        "Output head and attention included. Lower and further left is better.",
    ),
    LossFigure(
        "loss-seconds",
        "Loss against time",
        "elapsed_s",
        "training time",
        "Without evaluating and saving; other load on the machine is not taken out.",
    ),
)


def lines_of(study: Study, records: Records) -> list[Line]:
    """The arms with records, those that are compared last, so that they are drawn on top."""
    styles = styles_of(study)
    lines = [
        Line(arm, records[place], styles[arm.condition], arm in study.full)
        for place, arm in enumerate(study.arms)
        if records.get(place)
    ]
    return sorted(lines, key=lambda line: (line.full, -study.conditions.index(line.arm.condition)))


def loss_picture(study: Study, lines: Sequence[Line], figure: LossFigure) -> Picture | None:
    """Mean lines over the seeds in a band from the least to the greatest, growths as triangles."""
    bands = [(line, band_of(loss_curves(line.records, figure.x, study.metric))) for line in lines]
    drawn = [(line, band) for line, band in bands if band]
    if not drawn:
        return None
    longest = max(float(band.x[-1]) for _, band in drawn)
    unit, name = time_unit(longest) if figure.x == "elapsed_s" else (1.0, "")
    canvas, (axes,) = new_axes()
    tips: dict[str, str] = {}
    for number, (line, band) in enumerate(drawn):
        _draw_band(axes, line, band, unit)
        if line.full:
            tips |= _draw_growths(axes, line, band, figure.x, unit, number)
    _frame(axes, drawn)
    style_axes(
        axes, words.metric_words(study), f"{figure.x_label}, {name}" if name else figure.x_label, pad=8
    )
    axes.set_xlim(-0.015 * longest / unit, 1.02 * longest / unit)
    return Picture(
        key=figure.key,
        title=figure.title,
        caption=f"{figure.caption} {_band_words(bands)}",
        description=_describe(figure.title, drawn),
        figure=canvas,
        legend=_legend(study, drawn, growths=bool(tips)),
        tips=tips,
    )


def _band_words(bands: Sequence[tuple[Line, Band | None]]) -> str:
    found = []
    drawn = [(line, band) for line, band in bands if band]
    if any(band.seeds > 1 for _, band in drawn):
        found.append("Lines are means over the seeds, bands reach from the least to the greatest seed.")
    if any(band.stretched for _, band in drawn):
        found.append("Seeds that ended at different places are joined at equal shares of their way.")
    if any(not line.full for line, _ in drawn):
        found.append("Thin: the other lengths.")
    lacking = [line.arm.condition for line, band in bands if line.full and band is None]
    if lacking:
        found.append(f"Without a curve, for want of two evaluations: {words.joined(lacking)}.")
    return " ".join(found)


def _describe(title: str, drawn: Sequence[tuple[Line, Band]]) -> str:
    ends = [f"{line.arm.condition} ends at {band.mean[-1]:.3g}" for line, band in drawn if line.full]
    return f"{title}: {'; '.join(reversed(ends))}."


def _draw_band(axes: Axes, line: Line, band: Band, unit: float = 1.0) -> None:
    colour, dashes = line.style.colour, line.style.dashes
    x = band.x / unit
    if line.full and band.seeds > 1:
        axes.fill_between(x, band.low, band.high, color=colour, alpha=0.16, linewidth=0, zorder=2.0)
    width, alpha = (1.7, 1.0) if line.full else (0.9, 0.55)
    axes.plot(x, band.mean, color=colour, linestyle=dashes, linewidth=width, alpha=alpha, zorder=2.5)  # pyright: ignore[reportArgumentType]


def _draw_growths(axes: Axes, line: Line, band: Band, x: str, unit: float, number: int) -> dict[str, str]:
    tips: dict[str, str] = {}
    for k, mark in enumerate(growth_marks(line.arm, line.records, x)):
        y = float(np.interp(mark.x, band.x, band.mean))
        (point,) = axes.plot(
            [mark.x / unit], [y], marker="^", markersize=6.5, color=line.style.colour,
            markeredgecolor=LIGHT["paper"], markeredgewidth=0.8, linestyle="none", zorder=3.0,
        )  # fmt: skip
        gid = f"growth{number}-{k}"
        point.set_gid(gid)
        tips[gid] = mark.words
    return tips


def _frame(axes: Axes, drawn: Sequence[tuple[Line, Band]]) -> None:
    limits = frame([band.mean for line, band in drawn if line.full], quantile=0.88)
    if limits:
        axes.set_ylim(*limits)


def _legend(
    study: Study, drawn: Sequence[tuple[Line, Band]], *, growths: bool = False
) -> tuple[LegendEntry, ...]:
    styles = {line.arm.condition: line.style for line, _ in drawn}
    entries = [styles[name].line(name) for name in study.conditions if name in styles]
    return (*entries, GROWTH) if growths else tuple(entries)


# --- speed and stability ----------------------------------------------------------------------------------


def train_pictures(study: Study, lines: Sequence[Line]) -> list[Picture]:
    """Throughput and gradient norm over steps, of the arms that are compared."""
    full = [line for line in lines if line.full]
    found = [
        _train_picture(
            study, full, "throughput", "Throughput", "tokens_per_s", "tokens per second",
            "How fast each arm trained, smoothed. A shallower model is faster; each growth costs speed. Only "
            "arms on the same machine under the same load can be compared.", lambda low, high: (0.0, high),
        ),
        _train_picture(
            study, full, "gradient-norm", "Gradient norm", "grad_norm", "norm",
            "Before clipping, smoothed. An arm that is shocked by a growth shows it here first.",
            lambda low, high: (low, high),
        ),
    ]  # fmt: skip
    return [picture for picture in found if picture]


def _train_picture(
    study: Study,
    lines: Sequence[Line],
    key: str,
    title: str,
    column: str,
    y_label: str,
    caption: str,
    limits_of: Callable[[float, float], tuple[float, float]],
) -> Picture | None:
    bands = [(line, band_of(train_curves(line.records, column))) for line in lines]
    drawn = [(line, band) for line, band in bands if band]
    if not drawn:
        return None
    canvas, (axes,) = new_axes()
    for line, band in drawn:
        _draw_band(axes, line, band)
    limits = frame([band.mean for _, band in drawn], quantile=1.0)
    if limits:
        axes.set_ylim(*limits_of(*limits))
    high = axes.get_ylim()[1]
    style_axes(axes, y_label, pad=8)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: fmt.count(value) if high >= 1000 else f"{value:g}")
    )
    longest = max(float(band.x[-1]) for _, band in drawn)
    axes.set_xlim(-0.015 * longest, 1.02 * longest)
    means = "; ".join(f"{line.arm.condition} {fmt.count(float(band.mean.mean()))}" for line, band in drawn)
    return Picture(
        key=key,
        title=title,
        caption=caption,
        description=f"{title}, means: {means}." if key == "throughput" else _describe(title, drawn),
        figure=canvas,
        legend=_legend(study, drawn),
    )
