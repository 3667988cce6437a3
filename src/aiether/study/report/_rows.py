"""Figures of rows: a name, a point for each seed, the mean and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from aiether.study.report import _words as words
from aiether.study.report._results import Arm, AtCost, Contrast, Interval, Study
from aiether.study.report._styles import Style, styles_of
from aiether.study.report._tables import speed_up
from aiether.training import _format as fmt
from aiether.training.report.axes import new_axes, style_axes
from aiether.training.report.theme import LIGHT, LegendEntry, Picture

NAME_LENGTH = 34
_MEAN = LegendEntry("mean and 95 % interval", "ink", "bar")
_SEED = LegendEntry("one seed", "ink", "disc")


@dataclass(frozen=True)
class Row:
    """One line of the figure; `values` are (seed, value), and `shown` is what stands at its end."""

    name: str
    values: tuple[tuple[int, float], ...]
    mean: float
    ci95: Interval
    style: Style
    shown: str

    @property
    def drawable(self) -> bool:
        return math.isfinite(self.mean) or any(math.isfinite(value) for _, value in self.values)


@dataclass(frozen=True)
class Rows:
    """A figure of rows. `zero`: a line at 0. `linked`: so many rows, from the first, whose
    points are joined by seed."""

    key: str
    title: str
    x_label: str
    caption: str
    rows: Sequence[Row]
    show: Callable[[float], str]
    zero: bool = False
    linked: int = 0


def rows_picture(figure: Rows) -> Picture | None:
    """The drawn figure; None where no row has a number."""
    rows = [row for row in figure.rows if row.drawable]
    linked = [row for row in figure.rows[: figure.linked] if row.drawable]
    if not rows:
        return None
    canvas, (axes,) = new_axes(height=72 + 40 * len(rows))
    if figure.zero:
        axes.axvline(0.0, color=LIGHT["muted"], linewidth=1.1, zorder=1.4)
    tips: dict[str, str] = {}
    _link_seeds(axes, linked)
    for place, row in enumerate(rows):
        tips |= _draw(axes, row, place, figure.show)
    axes.set_ylim(len(rows) - 0.45, -0.62)
    axes.margins(x=0.05)
    _style(axes, figure)
    several = any(len(row.values) > 1 for row in rows)
    return Picture(
        key=figure.key,
        title=figure.title,
        caption=figure.caption,
        description=f"{figure.title}: " + "; ".join(f"{row.name} {row.shown}" for row in rows) + ".",
        figure=canvas,
        legend=(_SEED, _MEAN) if several else (_SEED,),
        tips=tips,
    )


def _style(axes: Axes, figure: Rows) -> None:
    style_axes(axes, "", figure.x_label)
    axes.set_title("")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def _draw(axes: Axes, row: Row, place: int, show: Callable[[float], str]) -> dict[str, str]:
    behind = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.6}
    words_at = {"y": place - 0.33, "va": "center", "fontsize": 10, "zorder": 3.5, "bbox": behind}
    axes.text(0.0, s=short(row.name), ha="left", transform=axes.get_yaxis_transform(),
              color=LIGHT["ink"], **words_at)  # fmt: skip
    axes.text(1.0, s=row.shown, ha="right", transform=axes.get_yaxis_transform(),
              color=LIGHT["muted"], **words_at)  # fmt: skip
    tips: dict[str, str] = {}
    for seed, value in row.values:
        if not math.isfinite(value):
            continue
        (point,) = axes.plot([value], [place], marker=row.style.marker, markersize=6, linestyle="none",
                             color=row.style.colour, alpha=0.75, markeredgewidth=0, zorder=2.6)  # fmt: skip
        gid = f"row{place}-{seed}"
        point.set_gid(gid)
        tips[gid] = f"{row.name}, seed {seed}: {show(value)}"
    if len(row.values) > 1 and math.isfinite(row.mean):
        _draw_interval(axes, row, place + 0.24)
        tips[f"interval{place}"] = f"{row.name}: {show(row.mean)}, 95 %: {words.interval(row.ci95, show)}"
        axes.lines[-1].set_gid(f"interval{place}")
    return tips


def _draw_interval(axes: Axes, row: Row, y: float) -> None:
    if all(map(math.isfinite, row.ci95)):
        axes.plot(row.ci95, [y, y], color=row.style.colour, linewidth=3.2, solid_capstyle="butt", zorder=2.8)
    axes.plot([row.mean], [y], marker="|", markersize=11, markeredgewidth=2.2, linestyle="none",
              color=LIGHT["ink"], zorder=3.0)  # fmt: skip


def _link_seeds(axes: Axes, rows: Sequence[Row]) -> None:
    for seed in dict.fromkeys(seed for row in rows for seed, _ in row.values):
        values = [dict(row.values).get(seed, math.nan) for row in rows]
        axes.plot(values, range(len(rows)), color=LIGHT["muted"], linewidth=0.8, alpha=0.55, zorder=1.8)


def short(name: str, most: int = NAME_LENGTH) -> str:
    """As much of a name as there is room for."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


# --- what is shown in rows --------------------------------------------------------------------------------


def final_loss(study: Study) -> Picture | None:
    """The final metric of every run, the seeds joined from arm to arm."""
    styles = styles_of(study)
    others = sorted((arm for arm in study.arms if arm not in study.full), key=lambda arm: arm.length)
    rows = [_arm_row(study, arm, styles[arm.condition]) for arm in (*study.full, *others)]
    return rows_picture(
        Rows(
            "final-loss",
            f"Final {words.short_metric(study)} by seed",
            words.metric_words(study),
            "Every run as a point; further left is better. Thin lines join the runs of one seed: where they "
            "run side by side, all arms share a seed's luck, and comparing seed by seed takes it out.",
            rows,
            fmt.loss,
            linked=len(study.full),
        )
    )


def _arm_row(study: Study, arm: Arm, style: Style) -> Row:
    values = tuple((cell.seed, cell.metric) for cell in arm.finished)
    name = words.arm_name(arm, study)
    return Row(name, values, arm.summary.mean, arm.summary.ci95, style, fmt.loss(arm.summary.mean))


def differences(study: Study) -> Picture | None:
    """Every comparison, seed by seed."""
    rows = [_contrast_row(study, each) for each in study.comparisons]
    return rows_picture(
        Rows(
            "differences",
            "Paired differences by seed",
            f"difference in {words.short_metric(study)}",
            "Each point is one seed's difference. Left of the line at 0 the first of the two is better; an "
            "interval that crosses it leaves the question open.",
            rows,
            words.signed,
            zero=True,
        )
    )


def effects(study: Study) -> Picture | None:
    """The effects of a factorial design."""
    rows = [_contrast_row(study, each) for each in study.factorial]
    return rows_picture(
        Rows(
            "effects",
            "Effects of the factors",
            f"effect on the {words.short_metric(study)}",
            "Left of the line at 0 the factor helps. An interaction left of it means that two factors do "
            "more together than each alone would add up to.",
            rows,
            words.signed,
            zero=True,
        )
    )


def _contrast_row(study: Study, each: Contrast) -> Row:
    style = styles_of(study).get(each.arm) or Style("grown", "line", "disc")
    values = tuple(zip(each.seeds or range(len(each.differences)), each.differences, strict=False))
    return Row(_pair(each), values, each.mean, each.ci95, style, words.signed(each.mean))


def _pair(each: Contrast | AtCost, join: str = " − ") -> str:
    """Both names, the first shortened where there is no room for both."""
    if not each.against:
        return each.arm
    room = NAME_LENGTH - len(each.against) - len(join)
    return f"{short(each.arm, max(room, 8))}{join}{each.against}"


SAVINGS = {
    "flops": ("savings-flops", "FLOPs to the same loss"),
    "seconds": ("savings-seconds", "Time to the same loss"),
    "tokens": ("savings-tokens", "Tokens to the same loss"),
}


def savings(study: Study) -> list[Picture]:
    """What each arm saved of the baseline's cost, a figure for each cost."""
    found = [_savings(study, cost) for cost in SAVINGS]
    return [picture for picture in found if picture]


def _savings(study: Study, cost: str) -> Picture | None:
    key, title = SAVINGS[cost]
    rows = [_saving_row(study, each) for each in study.savings if each.cost == cost]
    return rows_picture(
        Rows(
            key,
            title,
            f"per cent of the baseline's {words.COSTS[cost][0]} saved",
            "Right of the line at 0 the arm needed less than the baseline to the loss that it ended with. At "
            "the end of each row: how many times the arm's cost the baseline needs.",
            rows,
            lambda value: words.share(value / 100),
            zero=True,
        )
    )


def _saving_row(study: Study, each: AtCost) -> Row:
    values = tuple((seed, 100 * value) for seed, value in zip(each.seeds, each.values, strict=False))
    ci95 = (100 * each.ci95[0], 100 * each.ci95[1])
    style = styles_of(study).get(each.arm) or Style("grown", "line", "disc")
    name = each.arm if len(study.baselines) < 2 else _pair(each, " against ")
    return Row(name, values, 100 * each.mean, ci95, style, words.times(speed_up(each)))
