"""Every number of the report is that of the raw records."""

from __future__ import annotations

import copy
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.study.fakes import FakeWorkers, Silent
from tests.study.raw_records import Study, numbers
from tests.study.recompute import check
from tests.study.recompute_figures import check_figures
from tests.study.recompute_verdicts import check_verdicts
from tests.study.test_runner import content
from tests.study.test_spec import study

from aiether.study.report import _figures
from aiether.study.runner import run_study
from aiether.study.spec import spec_from

__all__ = ["content"]  # the fixture


def loss(condition: str, length: float, seed: int) -> float:
    """Irregular, and never twice the same gap; `wide` ends near the baseline's longest run, or beyond."""
    base = (
        4.0 - 0.7 * math.log(length / 0.5) + 0.05 * math.sin(7 * seed) + 0.002 * math.cos(9 * seed * length)
    )
    if condition == "wide":
        return base + 0.02 * math.sin(5 * seed + 1)
    return base if condition == "static" else base + 0.15 + 0.1 * math.sin(5 * seed)


@pytest.fixture
def folder(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three arms with its page and tables; its runs' records are made up."""
    monkeypatch.setattr("aiether.study.report._page._write_figures", lambda drawn, folder: None)
    content |= {"seeds": 5, "lengths": [0.5, 0.7, 1.0]}
    content["conditions"]["wide"] = {"settings": {**study()["conditions"]["grown"]["settings"], "n_embd": 64}}
    run_study(spec_from(content), tmp_path / "study", Silent(), backend=lambda threads: FakeWorkers(loss))
    return tmp_path / "study"


def test_effects_of_factors_can_be_computed_from_the_raw_records_alone(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.study.report._page._write_figures", lambda drawn, folder: None)

    def entangled(condition: str, length: float, seed: int) -> float:
        deep, wide = "deep.on" in condition, "wide.on" in condition
        spread = 0.01 * math.sin(7 * seed + 2 * deep + 3 * wide)
        return 4.0 - 0.4 * deep + 0.02 * wide + 0.3 * deep * wide + spread

    factors = {"deep": {"off": {}, "on": {"lr": 0.01}}, "wide": {"off": {}, "on": {"weight_decay": 0.3}}}
    del content["lengths"]
    content |= {"conditions": {}, "baseline": None, "factors": factors, "seeds": 5}
    folder = tmp_path / "study"
    run_study(spec_from(content), folder, Silent(), backend=lambda threads: FakeWorkers(entangled))
    found = check(folder)
    assert found["tables"] > 80
    assert found["verdicts"] > 20
    page = folder / "tables.md"
    page.write_text(page.read_text().replace("| deep x wide | 5 | +0.", "| deep x wide | 5 | +1."))
    with pytest.raises(AssertionError):
        check(folder)


def test_every_number_can_be_computed_from_the_raw_records_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check(folder)
    assert found["tables"] > 200
    assert found["verdicts"] > 90
    assert found["figures"] > 2000

    page = (folder / "tables.md").read_text()
    (folder / "tables.md").write_text(page.replace("| +0.", "| +1."))
    with pytest.raises(AssertionError):
        check(folder)
    (folder / "tables.md").write_text(page)

    whole = Study(folder)
    altered = dict(altered_verdicts(whole))
    assert len(altered) > 30
    assert [said for said, each in altered.items() if not refused(check_verdicts, each)] == []
    assert [way for way in altered_results(folder) if not refused(check_figures, whole)] == []
    assert not refused(check_figures, whole)
    band_of = _figures.band_of

    def other(curves: Any) -> Any:
        band = band_of(curves)
        return band and replace(band, low=band.low - 1e-5)

    monkeypatch.setattr(_figures, "band_of", other)
    assert refused(check_figures, whole)


def refused(check: Callable[[Study], None], study: Study) -> bool:
    try:
        check(study)
    except AssertionError:
        return True
    return False


def altered_verdicts(whole: Study) -> Iterator[tuple[str, Study]]:
    """The study with one number of one sentence changed, everywhere where the sentence stands."""
    for key in ("comparisons", "equal_cost", "savings"):
        for place, row in enumerate(whole.results[key]):
            said = row["verdict"]
            for number in re.finditer(r"\d+(?:\.\d+)?(?= |$|\)|%)", said):
                *start, last = number[0]
                other = (
                    said[: number.start()] + "".join(start) + str((int(last) + 3) % 10) + said[number.end() :]
                )
                altered = copy.copy(whole)
                altered.results = copy.deepcopy(whole.results)
                altered.results[key][place]["verdict"] = other
                altered.page = altered.page.replace(said, other)
                altered.html = altered.html.replace(html.escape(said), html.escape(other))
                yield other, altered


def altered_results(folder: Path) -> Iterator[str]:
    """The folder with one figure of results.json changed, and as it was in the end."""
    path = folder / "results.json"
    whole = path.read_text()
    for way in (("savings", 0, "savings", 1), ("savings", 0, "mean"), ("arms", 0, "cells", 0, "metric"),
                ("arms", 3, "cells", 2, "flops"), ("comparisons", 0, "differences", 4)):  # fmt: skip
        results = json.loads(whole)
        place = results
        for key in way[:-1]:
            place = place[key]
        place[way[-1]] *= 1.001
        path.write_text(json.dumps(results))
        yield "/".join(map(str, way))
    path.write_text(whole)


def test_a_printed_number_is_read_with_its_precision() -> None:
    assert numbers("1.00×10⁴") == [(pytest.approx(1e4), pytest.approx(100.0))]
    assert numbers("−6 %") == [(pytest.approx(-0.06), pytest.approx(0.01))]
    assert numbers("16.4 M") == [(pytest.approx(16.4e6), pytest.approx(1e5))]
    assert numbers("12 min 05 s") == [(725.0, 1.0)]
    assert numbers("+0.011 to −1,234") == [(0.011, 0.001), (-1234.0, 1.0)]
