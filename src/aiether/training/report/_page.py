"""The page: pictures and words put into the template."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aiether.training.report import _facts as facts
from aiether.training.report._figures import draw_pictures
from aiether.training.report._run import Run, load_run
from aiether.training.report._theme import DARK, LIGHT, css_variables, house_style, to_svg


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into the folder of a run, finished or not, and returns its path.

    The page holds everything it shows: it loads nothing, runs no script and can be sent as one file.

    Raises:
        ValueError: `run_dir` holds no run, or a damaged file; the message says which.
    """
    run_dir = Path(run_dir)
    page = render(load_run(run_dir))
    path, partial = run_dir / "report.html", run_dir / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def environment() -> Environment:
    """The templates; every text that is put into them is escaped."""
    return Environment(
        loader=PackageLoader("aiether.training.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: Run) -> str:
    """The page of a run, as HTML."""
    with house_style():
        figures = {
            part: [(picture, Markup(to_svg(picture))) for picture in pictures]
            for part, pictures in draw_pictures(run).items()
        }
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            run=run,
            facts=facts,
            figures=figures,
            light=Markup(css_variables(LIGHT)),
            dark=Markup(css_variables(DARK)),
        )
    )
