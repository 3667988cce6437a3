"""Final loss against what it cost: every arm at every length, and the front that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from aiether.study.report import _words as words
from aiether.study.report._results import Arm, Study
from aiether.study.report._styles import styles_of
from aiether.training import _format as fmt
from aiether.training.report.axes import DASHES, new_axes, style_axes, time_unit
from aiether.training.report.theme import LIGHT, LegendEntry, Picture

FIGURES = {
    "flops": ("pareto-flops", "Loss against FLOPs spent", "training FLOPs"),
    "seconds": ("pareto-seconds", "Loss against time spent", "training time"),
}
_FRONT = LegendEntry("front", "ink", "dots")


@dataclass(frozen=True)
class Point:
    """An arm at one length: means over its finished seeds, and the least and greatest of them."""

    arm: Arm
    cost: float
    loss: float
    low: float
    high: float


def points_of(study: Study, cost: str) -> list[Point]:
    """Every arm with a cost above 0 and a loss."""
    found: list[Point] = []
    for arm in study.arms:
        runs = [(cell.costs[cost], cell.metric) for cell in arm.finished]
        runs = [run for run in runs if all(map(math.isfinite, run)) and run[0] > 0]
        if runs:
            costs, losses = zip(*runs, strict=True)
            found.append(Point(arm, words.mean(costs), words.mean(losses), min(losses), max(losses)))
    return found


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in cost and loss, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def pareto_picture(study: Study, cost: str) -> Picture | None:
    """The figure over one cost; None with fewer than two points."""
    points = points_of(study, cost)
    if len(points) < 2:
        return None
    key, title, label = FIGURES[cost]
    longest = max(point.cost for point in points)
    unit, name = time_unit(longest) if cost == "seconds" else (1.0, "")
    front = front_of(points)
    canvas, (axes,) = new_axes(height=300)
    axes.set_xscale("log")
    _draw_front(axes, front, unit)
    tips = _draw_points(axes, study, points, front, unit, cost)
    curves = [name for name in study.baselines if _draw_baseline(axes, study, points, name, unit)]
    _style(axes, study, f"{label}, {name}" if name else label, [point.cost / unit for point in points])
    return Picture(
        key=key,
        title=title,
        caption=_caption(curves),
        description=f"{title}. On the front, from the cheapest: "
        + "; ".join(words.arm_name(point.arm, study) for point in front)
        + ".",
        figure=canvas,
        legend=_legend(study, points),
        tips=tips,
    )


def _caption(curves: Sequence[str]) -> str:
    text = (
        "Every arm at every length, means over seeds, bars from the least to the greatest; further down and "
    )
    text += "left is better. Ringed and joined by steps: the front, which nothing else beats in both."
    if len(curves) == 1:
        text += f" The line is {curves[0]} through its lengths, the curve that savings are read off."
    elif curves:
        text += f" The lines are {words.joined(curves)} through their lengths, off which savings are read."
    return text


def _legend(study: Study, points: Sequence[Point]) -> tuple[LegendEntry, ...]:
    styles, shown = styles_of(study), {point.arm.condition for point in points}
    return (*(styles[name].point(name) for name in study.conditions if name in shown), _FRONT)


def _draw_front(axes: Axes, front: Sequence[Point], unit: float) -> None:
    x, y = [point.cost / unit for point in front], [point.loss for point in front]
    dots = DASHES["dots"]
    axes.step(x, y, where="post", color=LIGHT["ink"], linewidth=1.1, linestyle=dots, zorder=1.7)
    axes.scatter(x, y, s=130, facecolors="none", edgecolors=LIGHT["ink"], linewidths=1.1, zorder=2.9)


def _draw_points(
    axes: Axes, study: Study, points: Sequence[Point], front: Sequence[Point], unit: float, cost: str
) -> dict[str, str]:
    styles, show = styles_of(study), words.COSTS[cost][1]
    tips: dict[str, str] = {}
    for number, point in enumerate(points):
        style, x = styles[point.arm.condition], point.cost / unit
        axes.plot([x, x], [point.low, point.high], color=style.colour, linewidth=1.2, alpha=0.7, zorder=2.2)
        (mark,) = axes.plot([x], [point.loss], marker=style.marker, markersize=7, color=style.colour,
                            markeredgecolor=LIGHT["paper"], markeredgewidth=0.7, zorder=3.0)  # fmt: skip
        mark.set_gid(f"point{number}")
        tips[f"point{number}"] = (
            f"{point.arm.condition}, {words.length(point.arm.length)} of the budget: {fmt.loss(point.loss)} "
            f"for {show(point.cost)}{'' if cost == 'seconds' else ' FLOPs'}"
            f"{', on the front' if point in front else ''}"
        )
    return tips


def _draw_baseline(axes: Axes, study: Study, points: Sequence[Point], name: str, unit: float) -> bool:
    """A baseline through its lengths, if there are several."""
    own = sorted((p for p in points if p.arm.condition == name), key=lambda point: point.cost)
    if len(own) < 2:
        return False
    style = styles_of(study)[name]
    x, y = [point.cost / unit for point in own], [point.loss for point in own]
    axes.plot(x, y, color=style.colour, linestyle=style.dashes, linewidth=1.5, zorder=2.1)  # pyright: ignore[reportArgumentType]
    return True


def _style(axes: Axes, study: Study, x_label: str, costs: Sequence[float]) -> None:
    """A logarithmic axis on which the ticks are still round numbers."""
    low, high = min(costs), max(costs)
    pad = max((high / low) ** 0.06, 1.03)
    axes.set_xlim(low / pad, high * pad)
    axes.margins(y=0.1)
    style_axes(axes, words.metric_words(study), x_label, pad=8)
    exponent = math.floor(math.log10(high)) if high >= 1e6 else 0
    if exponent:
        axes.set_xlabel(f"{x_label}, {fmt.power_of_ten(exponent)}")
    axes.xaxis.set_major_locator(FixedLocator(_ticks(low / pad, high * pad)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:.3g}"))


def _ticks(low: float, high: float) -> list[float]:
    if high / low < 12:
        ticks = [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    else:
        step = max(1, math.ceil(math.log10(high / low) / 5))
        ticks = [
            10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, step)
        ]
    return [tick for tick in ticks if low <= tick <= high]
