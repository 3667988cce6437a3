"""The page of `aiether inspect` in a real browser: wide, on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.training.browser import Browser, Tab, find_chromium
from tests.training.page_checks import check_figures, check_paper, check_reading

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
    assert check_reading(tab) > 300
    assert check_figures(tab) == 4


def test_paper_shows_all_figures_and_rows(browser: Browser, page: Path) -> None:
    tab = Tab(browser, page, width=1280, dark=True)
    assert {"layer 0", "layer 39", "frozen"} <= check_paper(tab)
