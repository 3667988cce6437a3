"""The one picture that stands for a run: what its compute bought, and how the model came to be."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aiether.training.report._curves import AGAINST_COMPUTE
from aiether.training.report._figures import draw_curve, legend_of
from aiether.training.report._lineage import draw_lineage
from aiether.training.report.axes import legend_lines
from aiether.training.report.run_records import Run, load_run
from aiether.training.report.theme import LIGHT, Picture, house_style, standalone_svg


def save_hero_figure(run_dir: Path | str, path: Path | str) -> Path:
    """Draws evaluation loss against FLOPs, with growths and baselines, beside the lineage of the layers.

    Args:
        run_dir: The folder of a run.
        path: Where to write: `.svg` (follows the reader's light or dark theme) or `.png` (light, 200 dpi).

    Raises:
        ValueError: Another suffix, or a folder without a recorded run, evaluation or lineage.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path.name} is neither .svg nor .png. Give a path that ends in one of the two.")
    run = load_run(Path(run_dir))
    if not len(run.evals) or not run.layers:
        raise ValueError(f"{run_dir} holds no evaluation or no lineage yet. Let the run reach an evaluation.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with house_style():
        picture = hero_picture(run)
        if path.suffix == ".svg":
            path.write_text(standalone_svg(picture), encoding="utf-8")
        else:
            FigureCanvasAgg(picture.figure)
            picture.figure.savefig(path, dpi=200, facecolor=LIGHT["paper"])
    return path


def hero_picture(run: Run) -> Picture:
    """Loss against compute on the left, the lineage on the right."""
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    figure.patch.set_visible(False)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.patch.set_visible(False)
    draw_curve(left, run, AGAINST_COMPUTE)
    draw_lineage(right, run, "each line a layer, new ones leave the one they were made from")
    figure.get_layout_engine().set(wspace=0.05)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    _add_legend(left, run)
    return Picture(
        key="hero",
        title="Loss against compute, and the lineage of the layers",
        caption="",
        description="Left: evaluation loss over training FLOPs of the grown model and its baselines. "
        "Right: every layer as a line in the stack, new ones leaving the layer they were made from.",
        figure=figure,
    )


def _add_legend(axes: Axes, run: Run) -> None:
    handles = legend_lines(legend_of(run, AGAINST_COMPUTE))
    axes.legend(handles=handles, loc="upper right", frameon=False, handlelength=2.6)
