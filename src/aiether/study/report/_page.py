"""The page of a study: words, tables and pictures in their order, written with the files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from aiether.study.report import _rows as rows
from aiether.study.report import _tables as tables
from aiether.study.report import _words as words
from aiether.study.report._curves import read_records
from aiether.study.report._figures import LOSS_FIGURES, Records, lines_of, loss_picture, train_pictures
from aiether.study.report._markdown import markdown_of
from aiether.study.report._pareto import FIGURES as PARETO
from aiether.study.report._pareto import pareto_picture
from aiether.study.report._pdf import to_pdf
from aiether.study.report._results import Study, read_results
from aiether.study.report._sections import Drawing, sections
from aiether.training.report.pages import environment, inline, write_whole
from aiether.training.report.tables import settings
from aiether.training.report.theme import Picture, house_style, standalone_svg

FIGURE_KEYS = {
    "differences",
    "final-loss",
    "effects",
    "throughput",
    "gradient-norm",
    *(figure.key for figure in LOSS_FIGURES),
    *(key for key, *_ in PARETO.values()),
    *(key for key, _ in rows.SAVINGS.values()),
}


def write_study_report(study_dir: Path) -> Path:
    """Writes `report.html`, `tables.md` and `figures/` into the folder of a study, finished or not.

    The page holds everything it shows: it loads nothing, runs no script and can be sent as one file. Equal
    records give equal files. Each file is replaced as a whole, the page last.

    Returns:
        The path of the page.

    Raises:
        ValueError: `results.json` is missing or damaged, or a cell's record is; the message says what to do.
    """
    study_dir = Path(study_dir)
    study = read_results(study_dir)
    records, lost = read_records(study, study_dir)
    with house_style():
        drawn = {part: inline(pictures) for part, pictures in _draw(study, records).items()}
        _write_figures([each for part in drawn.values() for each in part], study_dir / "figures")
    page = _render(study, lost, drawn)
    write_whole(study_dir / "tables.md", markdown_of(study).encode())
    path = study_dir / "report.html"
    write_whole(path, page.encode())
    return path


def _draw(study: Study, records: Records) -> dict[str, list[Picture]]:
    """The pictures by the part of the page that they stand in."""
    lines = lines_of(study, records)
    drawn: dict[str, list[Picture | None]] = {
        "comparisons": [rows.differences(study), rows.final_loss(study)],
        "factors": [rows.effects(study)],
        "loss": [loss_picture(study, lines, figure) for figure in LOSS_FIGURES],
        "cost": [*(pareto_picture(study, cost) for cost in PARETO), *rows.savings(study)],
        "speed": [*train_pictures(study, lines)],
    }
    return {part: [picture for picture in pictures if picture] for part, pictures in drawn.items()}


def _render(study: Study, lost: Sequence[str], drawn: Mapping[str, Sequence[Drawing]]) -> str:
    template = environment("aiether.study.report").get_template("study.html.jinja")
    return template.render(
        study=study,
        notices=(*words.notices(study), *lost),
        findings=words.findings(study),
        key_figures=tables.key_figures(study),
        sections=sections(study, drawn),
        measured=tables.measured(study),
        environment=settings(study.environment),
    )


def _write_figures(drawn: Sequence[Drawing], folder: Path) -> None:
    """Each picture as SVG and PDF, with a legend inside it; what an earlier report drew and this not goes."""
    folder.mkdir(exist_ok=True)
    for picture, svg in drawn:
        write_whole(folder / f"{picture.key}.svg", standalone_svg(picture, svg, legend=True).encode())
        write_whole(folder / f"{picture.key}.pdf", to_pdf(picture))
    for key in FIGURE_KEYS - {picture.key for picture, _ in drawn}:
        for ending in ("svg", "pdf"):
            (folder / f"{key}.{ending}").unlink(missing_ok=True)
