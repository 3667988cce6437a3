"""docs/statistics.md has the figures of the committed results."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
RESULTS = REPOSITORY / "benchmarks" / "results" / "study_statistics.json"


def test_the_page_has_the_measured_figures() -> None:
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "study_statistics.py"))
    page = (REPOSITORY / "docs" / "statistics.md").read_text(encoding="utf-8")
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    again = "python benchmarks/study_statistics.py --page docs/statistics.md"
    assert script["page_with_tables"](page, result) == page, f"run: {again}"


def test_what_was_measured_is_what_the_theory_says() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    for row in result["null"]:
        rejected = row["rejected"]
        assert rejected["t_holm"] <= 0.06
        assert rejected["sign_flip_holm"] <= 0.06
        if row["seeds"] == 5:
            assert rejected["sign_flip_holm"] == 0.0
        if (row["noise"], row["design"]) == ("normal", "independent"):
            assert rejected["t_holm"] == pytest.approx(1 - (1 - 0.05 / 3) ** 3, abs=0.01)
    normal = {row["seeds"]: row for row in result["coverage"] if row["noise"] == "normal"}
    assert all(row["t"] == pytest.approx(0.95, abs=0.01) for row in normal.values())
    assert normal[3]["bootstrap"] < 0.8
    assert normal[5]["bootstrap"] < 0.92
