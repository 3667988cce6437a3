"""The page: pictures and words put into the template."""

from __future__ import annotations

from pathlib import Path

from aiether.training.report import _facts as facts
from aiether.training.report._figures import draw_pictures
from aiether.training.report.pages import environment, inline, write_whole
from aiether.training.report.run_records import Run, load_run
from aiether.training.report.tables import settings
from aiether.training.report.theme import house_style


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into the folder of a run, finished or not, and returns its path.

    The page holds everything it shows: it loads nothing, runs no script and can be sent as one file.

    Raises:
        ValueError: `run_dir` holds no run, or a damaged file; the message says which.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_whole(path, render(load_run(run_dir)).encode())
    return path


def render(run: Run) -> str:
    """The page of a run, as HTML."""
    with house_style():
        figures = {part: inline(pictures) for part, pictures in draw_pictures(run).items()}
    template = environment().get_template("report.html.jinja")
    return template.render(run=run, facts=facts, settings=settings, figures=figures)
