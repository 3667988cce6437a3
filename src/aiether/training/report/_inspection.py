"""The page of an inspection: what a series of checkpoints tells, in figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from aiether import __version__
from aiether.geometry import GeometryMetrics
from aiether.integrations.offline import Inspection, LayerGeometry
from aiether.training import _format as fmt
from aiether.training.report.axes import new_axes
from aiether.training.report.pages import environment, inline, write_whole
from aiether.training.report.tables import Grid
from aiether.training.report.theme import LIGHT, LegendEntry, Picture, house_style

COLUMNS = ("", "τ", "τ norm.", "κ", "κ norm.", "ρ", "part. ratio", "displacement")
_WALK, _STRAIGHT = LegendEntry("random walk", "muted", "dots"), LegendEntry("straight line", "axis", "dash")
_LEAST = LegendEntry("least possible", "threshold", "dot-dash")
_LAYER = LegendEntry("layer", "grown")


@dataclass(frozen=True)
class Page:
    """The words and tables of the page."""

    title: str
    lead: str
    interval_note: str
    key_figures: tuple[tuple[str, str, str], ...]
    table: Grid
    tensor_tables: tuple[tuple[str, Grid], ...]
    skipped: str
    record: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Panel:
    """One panel of a figure: a value a layer, and the lines to hold it against (value, role, dashes)."""

    label: str
    attribute: str
    references: tuple[tuple[float, str, object], ...] = ()


def write_inspection(inspection: Inspection, path: Path) -> None:
    """Write one self-contained HTML page; it loads nothing and runs no script."""
    write_whole(path, render(inspection).encode())


def render(inspection: Inspection) -> str:
    """The page, as HTML."""
    with house_style():
        pictures = _pictures(inspection) if len(inspection.layers) > 1 else []
        figures = inline(pictures)
    template = environment().get_template("inspection.html.jinja")
    return template.render(page=_page(inspection), figures=figures)


def _page(inspection: Inspection) -> Page:
    names = [name for name, _ in inspection.checkpoints]
    tensors = [tensor for layer in inspection.layers for tensor in layer.tensors]
    count = len(tensors) + len(inspection.others)
    return Page(
        title=f"{names[0]} → {names[-1]}",
        lead=f"The path of {count:,} tensors in {len(inspection.layers)} layers through {len(names)} "
        "checkpoints.",
        interval_note=inspection.interval_note(),
        key_figures=_key_figures(inspection.model),
        table=Grid(COLUMNS, (_row("all tensors", inspection.model), *_layer_rows(inspection))),
        tensor_tables=tuple(
            (
                inspection.label(layer),
                Grid(COLUMNS, tuple(_row(_inner(layer, t.name), t.metrics) for t in layer.tensors)),
            )
            for layer in inspection.layers
        ),
        skipped=", ".join(inspection.skipped[:20]) + (" and more" if len(inspection.skipped) > 20 else ""),
        record=(
            *(
                (name, "step unknown" if step is None else f"step {step:,}")
                for name, step in inspection.checkpoints
            ),
            ("aiether", __version__),
        ),
    )


def _key_figures(model: GeometryMetrics) -> tuple[tuple[str, str, str], ...]:
    return (
        ("τ, all tensors", f"{model.tau:.3g}", f"normalised {model.tau_normalised:.2f}"),
        ("κ, all tensors", f"{model.kappa:.3g}", f"normalised {model.kappa_normalised:.2f}"),
        ("ρ", f"{model.rho:.3g}", f"least {model.rho_bound:.2f}, straight line {model.rho_straight:.2f}"),
        (
            "Participation ratio",
            f"{model.participation_ratio:.2f}",
            f"of {model.num_snapshots - 1} directions at most",
        ),
        ("Displacement", f"{model.displacement:.3g}", "in the units of the weights"),
    )


def _layer_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    rows = [_row(inspection.label(layer), layer.metrics) for layer in inspection.layers]
    return rows + [_row(tensor.name, tensor.metrics) for tensor in inspection.others]


def _row(name: str, metrics: GeometryMetrics) -> tuple[str, ...]:
    return (name, *fmt.geometry(metrics))


def _inner(layer: LayerGeometry, name: str) -> str:
    return name.removeprefix(f"{layer.name}.")


def _pictures(inspection: Inspection) -> list[Picture]:
    model = inspection.model
    dots, dashes, dash_dots = (0, (1, 1.8)), (0, (5, 2.2)), (0, (5, 2, 1, 2))
    velocities = model.num_snapshots - 1
    tau_walk, kappa_walk = np.sqrt(velocities), np.sqrt(velocities - 1)
    return [
        _picture(
            inspection,
            "tau",
            "Tortuosity τ",
            "How much longer a layer's path is than the way it covered. Below, normalised for the number of "
            "checkpoints.",
            (
                Panel("τ, as measured", "tau", ((1.0, "axis", dashes), (tau_walk, "muted", dots))),
                Panel("τ, normalised", "tau_normalised", ((0.0, "axis", dashes), (1.0, "muted", dots))),
            ),
        ),
        _picture(
            inspection,
            "kappa",
            "Effective curvature κ",
            "How much of the movement goes across the direction of travel rather than along it. Below, "
            "normalised in the same way.",
            (
                Panel("κ, as measured", "kappa", ((0.0, "axis", dashes), (kappa_walk, "muted", dots))),
                Panel("κ, normalised", "kappa_normalised", ((0.0, "axis", dashes), (1.0, "muted", dots))),
            ),
        ),
        _picture(
            inspection,
            "rho",
            "Spectral tortuosity ρ",
            "Spread of the checkpoints over the distance covered. It cannot be less than "
            f"{model.rho_bound:.2f} with this many checkpoints.",
            (
                Panel(
                    "ρ",
                    "rho",
                    ((model.rho_straight, "axis", dashes), (model.rho_bound, "threshold", dash_dots)),
                ),
            ),
            legend=(_LAYER, _STRAIGHT, _LEAST),
        ),
        _picture(
            inspection,
            "participation",
            "Participation ratio and displacement",
            f"Above, how many of the {velocities} possible directions a layer's movement has; below, how far "
            "it came, in the units of the weights.",
            (Panel("participation ratio", "participation_ratio"), Panel("displacement", "displacement")),
            legend=(_LAYER,),
        ),
    ]


def _picture(
    inspection: Inspection,
    key: str,
    title: str,
    caption: str,
    panels: Sequence[Panel],
    *,
    legend: tuple[LegendEntry, ...] = (_LAYER, _WALK, _STRAIGHT),
) -> Picture:
    figure, axes = new_axes(height=400 if len(panels) > 1 else 265, rows=len(panels))
    tips: dict[str, str] = {}
    for number, (place, panel) in enumerate(zip(axes, panels, strict=True)):
        tips |= _draw(place, inspection.layers, panel, number, last=number == len(panels) - 1)
    values = [getattr(layer.metrics, panels[0].attribute) for layer in inspection.layers]
    return Picture(
        key=key,
        title=title,
        caption=caption,
        description=f"{title} of {len(values)} layers: least {min(values):.3g}, greatest {max(values):.3g}.",
        figure=figure,
        legend=legend,
        tips=tips,
    )


def _draw(
    axes: Axes, layers: Sequence[LayerGeometry], panel: Panel, number: int, *, last: bool
) -> dict[str, str]:
    for value, role, dashes in panel.references:
        axes.axhline(value, color=LIGHT[role], linewidth=1.2, linestyle=dashes)  # pyright: ignore[reportArgumentType]
    values = [getattr(layer.metrics, panel.attribute) for layer in layers]
    places = np.arange(len(layers))
    breaks = [i for i in range(1, len(layers)) if layers[i].stack != layers[i - 1].stack]
    for part in np.split(places, breaks):
        axes.plot(part, [values[i] for i in part], color=LIGHT["grown"], linewidth=1.0, alpha=0.5)
    tips = {}
    for place, (layer, value) in enumerate(zip(layers, values, strict=True)):
        (point,) = axes.plot(
            [place], [value], marker="o", markersize=4, color=LIGHT["grown"], linestyle="none"
        )
        point.set_gid(f"layer{number}-{place}")
        tips[f"layer{number}-{place}"] = f"{layer.name}: {panel.label} {value:.3g}"
    axes.set_title(panel.label, loc="left", fontsize=10.5, color=LIGHT["muted"])
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.03, y=0.14)
    if last:
        axes.set_xlabel("layer, from the input up" if not breaks else "layer, stack after stack")
    return tips
