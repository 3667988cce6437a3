"""The lineage of the layers as a picture: time to the right, the stack upwards, children out of parents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator

from aiether.training.report.axes import mark_growths, new_axes, style_axes
from aiether.training.report.run_records import Layer, Run
from aiether.training.report.theme import LIGHT, NUM_AGES, LegendEntry, Picture


def lineage_picture(run: Run) -> Picture | None:
    """Every layer as a line from its birth to the end; None when no lineage was recorded."""
    if not run.layers or not run.last_step:
        return None
    births = birth_steps(run.layers)
    figure, (axes,) = new_axes(height=max(265.0, 60 + 9.0 * len(run.layers)))
    tips = draw_lineage(axes, run)
    return Picture(
        key="lineage",
        title="Lineage of the layers",
        caption="Each line is a layer, drawn where it stands in the stack, the input below and the output "
        "above. A new layer leaves the line of the layer it was made from.",
        description=f"{len(run.layers)} layers at the end; "
        + "; ".join(f"{sum(x.born_step == b for x in run.layers)} born at step {b:,}" for b in births)
        + ".",
        figure=figure,
        legend=_legend(births),
        tips=tips,
    )


def draw_lineage(axes: Axes, run: Run, label: str = "position in the stack") -> dict[str, str]:
    """Draws the lineage into given axes and returns the tool tips of its layers and growths."""
    births = birth_steps(run.layers)
    end = max(run.last_step, births[-1] + 1)
    gaps = np.diff([*births, end])
    width = float(min(0.08 * end, gaps[1:].min() * 0.6 if len(births) > 1 else end))
    tips: dict[str, str] = {}
    for layer in sorted(run.layers, key=lambda layer: -layer.born_step):
        gid = f"layer-{layer.layer_id}"
        tips[gid] = _tip(layer)
        outline = layer_outline(layer, run.layers, births, end, width)
        colour = LIGHT[f"age{age_role(births.index(layer.born_step), len(births))}"]
        thickness = 3.4 if len(run.layers) <= 12 else 2.2 if len(run.layers) <= 24 else 1.4
        patch = PathPatch(outline, fill=False, edgecolor=colour, linewidth=thickness, capstyle="round")
        patch.set_zorder(3 - births.index(layer.born_step) / (2 * len(births)))
        patch.set_gid(gid)
        axes.add_patch(patch)
    axes.set_xlim(-0.02 * end, 1.02 * end)
    axes.set_ylim(0.3, len(run.layers) + 0.7)
    style_axes(axes, label)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(FixedLocator(_position_ticks(len(run.layers))))
    return tips | mark_growths(axes, run, run.growth_steps)


def birth_steps(layers: Sequence[Layer]) -> list[int]:
    """The steps at which layers were born, ascending; the first ones are those of the start."""
    return sorted({layer.born_step for layer in layers})


def position_at(layer_id: int, layers: Sequence[Layer], step: int) -> int:
    """Place in the stack, from 1, among the layers born by `step`: growing never reorders old ones."""
    present = [layer.layer_id for layer in layers if layer.born_step <= step]
    return present.index(layer_id) + 1


def layer_outline(
    layer: Layer, layers: Sequence[Layer], births: Sequence[int], end: int, width: float
) -> Outline:
    """A layer's line: out of its parent's place at birth, and over to a new place at each later growth."""
    first = births[0]
    known = {other.layer_id for other in layers}
    start = position_at(layer.layer_id, layers, layer.born_step)
    if layer.born_step > first and layer.parent in known:
        before = max(step for step in births if step < layer.born_step)
        start = position_at(layer.parent, layers, before)
    vertices: list[tuple[float, float]] = [(layer.born_step, start)]
    codes = [Outline.MOVETO]
    here = start
    for step in [step for step in births if step >= layer.born_step]:
        there = position_at(layer.layer_id, layers, step)
        vertices.append((step, here))
        codes.append(Outline.LINETO)
        if there != here:
            vertices += [(step + width / 2, here), (step + width / 2, there), (step + width, there)]
            codes += [Outline.CURVE4] * 3
        here = there
    return Outline([*vertices, (end, here)], [*codes, Outline.LINETO])


def age_role(generation: int, generations: int) -> int:
    """Colour of a generation: the first layers keep theirs, and many generations spread over the rest."""
    if generations <= NUM_AGES or generation == 0:
        return generation
    return 1 + round((generation - 1) * (NUM_AGES - 2) / (generations - 2))


def _legend(births: Sequence[int]) -> tuple[LegendEntry, ...]:
    """One entry a generation, or the first and the last when there are many."""
    labels = ["from the start", *[f"born at step {step:,}" for step in births[1:]]]
    entries = [LegendEntry(label, f"age{age_role(i, len(births))}", "bar") for i, label in enumerate(labels)]
    return tuple(entries) if len(entries) <= 5 else (entries[0], entries[1], entries[-1])


def _tip(layer: Layer) -> str:
    if layer.parent is None:
        return f"Layer {layer.layer_id}, born at step {layer.born_step:,}"
    return (
        f"Layer {layer.layer_id}, born at step {layer.born_step:,} from layer {layer.parent} ({layer.init})"
    )


def _position_ticks(depth: int) -> list[int]:
    every = max(1, -(-depth // 12))
    crowded = {every, depth - 1} if every > 1 else set()  # beside the first and the last, which are shown
    return sorted(({*range(every, depth + 1, every)} - crowded) | {1, depth})
