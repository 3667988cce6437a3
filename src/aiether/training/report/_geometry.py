"""Path length and curvature of the weights over time, against the thresholds and the random walk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from aiether.training.report.axes import mark_growths, new_axes, style_axes
from aiether.training.report.run_records import Run, as_number
from aiether.training.report.series import finite, thin
from aiether.training.report.theme import LIGHT, LegendEntry, Picture

LEGEND = (
    LegendEntry("measured", "grown"),
    LegendEntry("threshold for growing", "threshold", "dash"),
    LegendEntry("random walk", "muted", "dots"),
)

FILLED = " At filled points both thresholds are reached."


@dataclass(frozen=True)
class Measure:
    """τ or κ: its columns, its threshold in the configuration, its value for a straight line.

    A pure random walk over S snapshots has about the square root of S minus `lost` (1 for τ, 2 for κ).
    """

    key: str
    symbol: str
    title: str
    caption: str
    threshold: str
    straight: float
    lost: int


TAU = Measure(
    "tau",
    "τ",
    "Tortuosity τ",
    "How much longer the weights' path is than the way it covered. Below, normalised for the number of "
    "snapshots: 0 is a straight line, 1 a random walk.",
    "tau_crit",
    straight=1.0,
    lost=1,
)
KAPPA = Measure(
    "kappa",
    "κ",
    "Effective curvature κ",
    "How much of the movement goes across the direction of travel rather than along it. Below, normalised "
    "in the same way.",
    "kappa_crit",
    straight=0.0,
    lost=2,
)


def geometry_pictures(run: Run) -> tuple[Picture | None, Picture | None]:
    """τ and κ, raw above and normalised below."""
    return measure_picture(run, TAU), measure_picture(run, KAPPA)


def measure_picture(run: Run, measure: Measure) -> Picture | None:
    steps, values = finite(run.evals.column("step"), run.evals.column(measure.key))
    if not len(steps):
        return None
    figure, panels = new_axes(height=400, rows=2)
    _draw_panel(panels[0], run, measure, normalised=False)
    _draw_panel(panels[1], run, measure, normalised=True)
    tips = {}
    for panel, axes in enumerate(panels):
        tips |= mark_growths(axes, run, run.growth_steps, panel)
    return Picture(
        key=measure.key,
        title=measure.title,
        caption=measure.caption + (FILLED if _threshold(run, measure) is not None else ""),
        description=f"{measure.title}: {values[0]:.3g} at step {steps[0]:,.0f}, {values[-1]:.3g} at step "
        f"{steps[-1]:,.0f}, between {values.min():.3g} and {values.max():.3g}.",
        figure=figure,
        legend=LEGEND if _threshold(run, measure) is not None else (LEGEND[0], LEGEND[2]),
        tips=tips,
    )


def _draw_panel(axes: Axes, run: Run, measure: Measure, *, normalised: bool) -> None:
    column = f"{measure.key}_normalised" if normalised else measure.key
    steps, values = finite(run.evals.column("step"), run.evals.column(column))
    if normalised:
        axes.axhline(1.0, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (1, 1.8)))
        axes.axhline(0.0, color=LIGHT["axis"], linewidth=0.8)
    else:
        for x, y in _pieces(run, *_random_walk(run, measure)):
            axes.plot(x, y, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (1, 1.8)))
    threshold = _threshold(run, measure)
    if threshold is not None and normalised == (run.config.get("thresholds") == "normalised"):
        axes.axhline(threshold, color=LIGHT["threshold"], linewidth=1.4, linestyle=(0, (5, 2.2)))
    for x, y in _pieces(run, steps, values):
        axes.plot(*thin(x, y), color=LIGHT["grown"], zorder=2.4)
    _draw_points(axes, run, column)
    label = f"{measure.symbol}, normalised" if normalised else f"{measure.symbol}, as measured"
    style_axes(axes, label, "step" if normalised else None)
    axes.margins(y=0.12)
    axes.set_xlim(-0.015 * run.last_step, 1.02 * run.last_step)


def _pieces(run: Run, x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The series cut at the growths: a window begins anew there, and a line across would tell of nothing."""
    cuts = np.searchsorted(x, run.growth_steps, side="right")
    return list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))


def _draw_points(axes: Axes, run: Run, column: str) -> None:
    """Evaluations as points, while they can be told apart: filled where both thresholds are met."""
    if len(run.evals) > 150:
        return
    x, y = run.evals.column("step"), run.evals.column(column)
    both = stagnant(run)
    axes.scatter(
        x, y, s=13, zorder=2.6, linewidths=1.1, edgecolors=LIGHT["grown"],
        facecolors=[LIGHT["grown"] if met else LIGHT["paper"] for met in both],
    )  # fmt: skip


def stagnant(run: Run) -> list[bool]:
    """For each evaluation, whether τ and κ are both at or above their thresholds."""
    suffix = "_normalised" if run.config.get("thresholds") == "normalised" else ""
    limits = [(f"{measure.key}{suffix}", _threshold(run, measure)) for measure in (TAU, KAPPA)]
    return [
        all(limit is not None and as_number(row.get(column)) >= limit for column, limit in limits)
        for row in run.evals.rows
    ]


def _random_walk(run: Run, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    steps, snapshots = finite(run.evals.column("step"), run.evals.column("num_snapshots"))
    keep = snapshots >= 3
    return thin(steps[keep], np.sqrt(snapshots[keep] - measure.lost))


def _threshold(run: Run, measure: Measure) -> float | None:
    """The threshold of a run whose trigger looks at it."""
    value = as_number(run.config.get(measure.threshold))
    return value if run.config.get("trigger") == "geometric" and np.isfinite(value) else None
