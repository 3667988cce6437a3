"""The page of `aiether inspect` in a real browser: wide, on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.browser import Browser, Tab, find_chromium
from tests.training.test_report_render import CUT_TABLES, FIGURES, TEXTS, words

from aiether.geometry import GeometryMetrics, metrics_from_gram
from aiether.integrations.offline import Inspection, LayerGeometry, TensorGeometry
from aiether.training.report import write_inspection

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path: apt-get install chromium, or Chrome",
)
LONG = "a_module_with_a_very_long_name." * 4


def walk(seed: int, drift: float) -> GeometryMetrics:
    velocities = torch.randn(5, 300, generator=torch.Generator().manual_seed(seed)) + drift
    return metrics_from_gram(velocities @ velocities.T)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    still = metrics_from_gram(torch.zeros(5, 5))
    layers = tuple(
        LayerGeometry("model.layers", i, walk(i, i / 20), (TensorGeometry(f"{LONG}{i}", (3,), walk(i, 1.0)),))
        for i in range(40)
    )
    inspection = Inspection(
        checkpoints=tuple(
            (f"checkpoint-{step}-{'of-a-run-' * 6}", 100 * step) for step in (1, 2, 3, 4, 5, 16)
        ),
        model=walk(1, 0.3),
        layers=layers,
        others=(TensorGeometry(f"{LONG}weight", (3,), walk(2, 2.0)), TensorGeometry("frozen", (1,), still)),
        skipped=tuple(f"{LONG}counter{i}" for i in range(30)),
    )
    path = tmp_path_factory.mktemp("page") / "geometry.html"
    write_inspection(inspection, path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_everything_fits_and_can_be_read(browser: Browser, page: Path, width: int, dark: bool) -> None:
    tab = Tab(browser, page, width=width, dark=dark)
    sizes: dict[str, int] = tab.ask(
        "({scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth})"
    )
    assert sizes["scroll"] <= sizes["client"], "the page scrolls sideways"
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    assert len(texts) > 300
    assert words([text for text in texts if text["contrast"] < 4.5]) == []
    assert words([text for text in texts if text["left"] < 0 or text["right"] > sizes["client"]]) == []
    assert words([text for text in texts if text["px"] < 9]) == []
    assert tab.ask(CUT_TABLES) == []
    figures: list[dict[str, Any]] = tab.ask(FIGURES)
    assert len(figures) == 4
    assert all(figure["width"] > 300 and figure["lines"] >= 2 for figure in figures)
    assert tab.complaints() == []


def test_paper_shows_all_figures_and_rows(browser: Browser, page: Path) -> None:
    tab = Tab(browser, page, width=1280, dark=True)
    tab.media(dark=True, kind="print")
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    assert words([text for text in texts if text["contrast"] < 4.5]) == []
    assert {"layer 0", "layer 39", "frozen"} <= {text["text"] for text in texts}
