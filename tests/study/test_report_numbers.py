"""Every number of the report is that of the raw records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tests.study.fakes import FakeWorkers, Silent
from tests.study.recompute import check, numbers
from tests.study.test_runner import content
from tests.study.test_spec import study

from aiether.study.runner import run_study
from aiether.study.spec import spec_from

__all__ = ["content"]  # the fixture


def loss(condition: str, length: float, seed: int) -> float:
    """Irregular, and never twice the same gap."""
    base = (
        4.0 - 0.7 * math.log(length / 0.5) + 0.05 * math.sin(7 * seed) + 0.002 * math.cos(9 * seed * length)
    )
    return base if condition == "static" else base + 0.15 + 0.1 * math.sin(5 * seed)


def test_the_tables_can_be_computed_from_the_raw_records_alone(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content |= {"seeds": 5, "lengths": [0.5, 0.7, 1.0]}
    content["conditions"]["wide"] = {"settings": {**study()["conditions"]["grown"]["settings"], "n_embd": 64}}
    folder = tmp_path / "study"
    run_study(spec_from(content), folder, Silent(), backend=lambda threads: FakeWorkers(loss))
    assert check(folder) > 200
    page = (folder / "tables.md").read_text()
    (folder / "tables.md").write_text(page.replace("| +0.", "| +1."))
    with pytest.raises(AssertionError):
        check(folder)


def test_a_printed_number_is_read_with_its_precision() -> None:
    assert numbers("1.00×10⁴") == [(pytest.approx(1e4), pytest.approx(100.0))]
    assert numbers("−6 %") == [(pytest.approx(-0.06), pytest.approx(0.01))]
    assert numbers("16.4 M") == [(pytest.approx(16.4e6), pytest.approx(1e5))]
    assert numbers("12 min 05 s") == [(725.0, 1.0)]
    assert numbers("+0.011 to −1,234") == [(0.011, 0.001), (-1234.0, 1.0)]
