"""The curves of a report, each a pure function of a run; None where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from aiether.training import _format as fmt
from aiether.training.report._curves import AGAINST_COMPUTE, CURVES, Curve
from aiether.training.report._geometry import geometry_pictures
from aiether.training.report._lineage import lineage_picture
from aiether.training.report.axes import (
    BASELINE_STYLES,
    GROWTH_ENTRY,
    mark_growths,
    new_axes,
    style_axes,
    time_unit,
)
from aiether.training.report.run_records import Run, Table
from aiether.training.report.series import finite, frame, smooth, thin
from aiether.training.report.theme import LIGHT, LegendEntry, Picture

Column = NDArray[np.float64]


def draw_pictures(run: Run) -> dict[str, list[Picture]]:
    """All pictures of a run by the part of the page they stand in. Parts without a picture are left out."""
    drawn: dict[str, list[Picture | None]] = {
        "outcome": [curve_picture(run, AGAINST_COMPUTE), lineage_picture(run)],
        "loss": [curve_picture(run, curve) for curve in CURVES["loss"]],
        "geometry": list(geometry_pictures(run)),
        "speed": [curve_picture(run, curve) for curve in CURVES["speed"]],
    }
    parts = {part: [picture for picture in pictures if picture] for part, pictures in drawn.items()}
    return {part: pictures for part, pictures in parts.items() if pictures}


def curve_picture(run: Run, curve: Curve) -> Picture | None:
    """One figure of curves: the run, its baselines in dashes, its growths as dotted lines."""
    x, y = _values(run, curve)
    if not len(x):
        return None
    figure, (axes,) = new_axes()
    tips = draw_curve(axes, run, curve)
    return Picture(
        key=curve.key,
        title=curve.title,
        caption=curve.caption,
        description=_describe(curve, x, y, len(run.growths)),
        figure=figure,
        legend=legend_of(run, curve),
        tips=tips,
    )


def draw_curve(axes: Axes, run: Run, curve: Curve) -> dict[str, str]:
    """Draws a curve into given axes and returns the tool tips of its growths."""
    unit, x_label = _unit(run, curve)
    x, y = _values(run, curve, unit)
    shown: list[Column] = []
    for baseline, (role, _, dashes) in _styled_baselines(run, curve):
        base_x, base_y = _values(baseline, curve, unit)
        shown.append(_draw_series(axes, base_x, base_y, role, curve.noisy, dashes=dashes, order=2.2))
    shown.append(_draw_series(axes, x, y, "grown", curve.noisy, breaks=run.growth_steps, order=2.5))
    limits = frame(shown, quantile=1.0) if curve.whole else frame(shown)
    if limits:
        axes.set_ylim(0.0 if curve.from_zero else limits[0], limits[1])
    style_axes(axes, curve.y_label, x_label)
    axes.set_xlim(-0.015 * axes.get_xlim()[1], None)
    return mark_growths(axes, run, [x_at_step(run, curve.x, step) / unit for step in run.growth_steps])


def _draw_series(
    axes: Axes,
    x: Column,
    y: Column,
    role: str,
    noisy: bool,
    *,
    dashes: object = "solid",
    breaks: Sequence[float] = (),
    order: float,
) -> Column:
    """Draws one series and returns what the frame has to show of it."""
    colour = LIGHT[role]
    if noisy:
        axes.plot(*thin(x, y), color=colour, linewidth=0.6, alpha=0.28, zorder=order - 0.5)
        y = smooth(x, y, breaks)
    few = len(x) <= 60 and not noisy
    axes.plot(
        *thin(x, y),
        color=colour,
        linestyle=dashes,  # pyright: ignore[reportArgumentType]
        marker="o" if few and dashes == "solid" else None,
        markersize=2.6,
        zorder=order,
    )
    return y


def legend_of(run: Run, curve: Curve) -> tuple[LegendEntry, ...]:
    baselines = _styled_baselines(run, curve)
    entries = [LegendEntry("grown" if run.growths else "this run", "grown")]
    entries += [LegendEntry(baseline_label(baseline), role, mark) for baseline, (role, mark, _) in baselines]
    return (*entries, GROWTH_ENTRY) if run.growths else tuple(entries)


def baseline_label(baseline: Run) -> str:
    depth = baseline.latest("depth")
    return f"{baseline.name}, {depth:.0f} layers" if depth else baseline.name


def x_at_step(run: Run, x: str, step: int) -> float:
    """Where a step lies on an axis that counts something else: compute, tokens, time; NaN if unknown."""
    if x == "step":
        return float(step)
    points = [(row.get("step"), row.get(x)) for table in (run.train, run.evals) for row in table.rows]
    steps, values = finite(*np.array(points or [(None, None)], dtype=np.float64).T)
    if not len(steps):
        return float("nan")
    order = np.argsort(steps, kind="stable")
    return float(np.interp(step, steps[order], values[order]))


def _styled_baselines(run: Run, curve: Curve) -> list[tuple[Run, tuple[str, str, object]]]:
    measured = [baseline for baseline in run.baselines if len(_values(baseline, curve)[0])]
    return [(baseline, BASELINE_STYLES[i % len(BASELINE_STYLES)]) for i, baseline in enumerate(measured)]


def _values(run: Run, curve: Curve, unit: float = 1.0) -> tuple[Column, Column]:
    table: Table = getattr(run, curve.table)
    x, y = finite(table.column(curve.x), table.column(curve.y))
    return x / unit, y


def _unit(run: Run, curve: Curve) -> tuple[float, str]:
    """What x is divided by, and its label: time is read in seconds, minutes or hours, not in 10⁴ seconds."""
    if curve.x != "elapsed_s":
        return 1.0, curve.x_label
    ends = [x[-1] for each in (run, *run.baselines) if len(x := _values(each, curve)[0])]
    unit, name = time_unit(max(ends, default=0.0))
    return unit, f"{curve.x_label}, {name}"


def _describe(curve: Curve, x: Column, y: Column, growths: int) -> str:
    show: Callable[[float], str] = {
        "step": lambda value: f"step {fmt.count(value)}",
        "tokens": lambda value: f"{fmt.count(value)} tokens",
        "flops": lambda value: f"{fmt.scientific(value)} FLOPs",
        "elapsed_s": fmt.duration,
    }[curve.x]
    return (
        f"{curve.title}: {y[0]:.3g} at {show(x[0])}, {y[-1]:.3g} at {show(x[-1])}, "
        f"least {y.min():.3g}; {growths} growths marked."
    )
