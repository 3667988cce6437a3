"""The report of a run: the run folder in, one self-contained HTML page out.

`write_report` reads what a run has recorded (finished or not) and writes `report.html` beside it;
`save_hero_figure` draws the one picture that stands for a run; `write_cards` writes the model card beside the
final model; `write_inspection` writes the page of `aiether inspect`.
"""

from __future__ import annotations

from aiether.training.report._card import write_cards
from aiether.training.report._hero import save_hero_figure
from aiether.training.report._inspection import write_inspection
from aiether.training.report._page import write_report

__all__ = ["save_hero_figure", "write_cards", "write_inspection", "write_report"]
