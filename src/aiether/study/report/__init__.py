"""The report of a study: its `results.json` and the records of its cells in, a page, tables and figures out.

`write_study_report` writes `report.html` (one self-contained file), `tables.md` and `figures/<key>.svg` and
`.pdf` into the study's folder; `markdown_tables` gives the tables of a results mapping as Markdown.
"""

from __future__ import annotations

from aiether.study.report._markdown import markdown_tables
from aiether.study.report._page import write_study_report

__all__ = ["markdown_tables", "write_study_report"]
