"""The report in a real browser: wide, on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.training.browser import Browser, Tab, find_chromium
from tests.training.fake_runs import STATIC, FakeRun, write_fake_run
from tests.training.page_checks import (
    PHONE,
    WIDE,
    check_breaks,
    check_figures,
    check_paper,
    check_reading,
    check_words_in_figures,
)

from aiether.training.report import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path: apt-get install chromium, or Chrome",
)
LONG = "a-name-without-any-place-to-break-it-" * 8


MANY = tuple((2000 * i, 1 + i) for i in range(1, 24))
RUNS = {
    "a name and settings that are hard to set": (LONG[:200], FakeRun(name_in_config=LONG, prompt=LONG)),
    "many growths and hours": ("many", FakeRun(steps=48_000, start_depth=1, growths=MANY)),
}


@pytest.fixture(scope="module", params=RUNS)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, fake = RUNS[request.param]
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / name, fake)
    write_fake_run(folder / "baseline-static", STATIC)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


OpenPage = Callable[..., Tab]


@pytest.fixture(scope="module")
def open_page(browser: Browser, report: Path) -> OpenPage:
    return lambda **look: Tab(browser, report, **look)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_everything_fits_and_can_be_read(open_page: OpenPage, width: int, dark: bool) -> None:
    tab = open_page(width=width, dark=dark)
    assert check_reading(tab) > 200


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_the_figures_are_drawn_and_their_words_do_not_collide(open_page: OpenPage, width: int) -> None:
    tab = open_page(width=width)
    assert check_figures(tab) >= 11
    check_words_in_figures(tab)


def test_dark_and_light_differ_in_paper_and_ink(open_page: OpenPage) -> None:
    script = "getComputedStyle(document.body).backgroundColor"
    assert open_page(width=WIDE).ask(script) == "rgb(255, 255, 255)"
    assert open_page(width=WIDE, dark=True).ask(script) == "rgb(20, 24, 29)"


def test_paper_is_light_shows_the_record_and_cuts_no_figure(open_page: OpenPage) -> None:
    tab = open_page(width=WIDE, dark=True)
    shown = check_paper(tab)
    grew = [text for text in shown if re.fullmatch(r"grew \d+→\d+ layers, which took 0.41 s", text)]
    assert grew, "what is folded is lost on paper"
    assert "kappa_crit" in shown
    pages, parts = check_breaks(tab)
    assert 4 <= pages <= 12
    assert parts >= 11 + 4
