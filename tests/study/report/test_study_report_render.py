"""The report of a large study in a real browser: wide, on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.training.browser import Browser, Tab, find_chromium
from tests.training.page_checks import (
    PHONE,
    WIDE,
    check_breaks,
    check_figures,
    check_paper,
    check_reading,
    check_words_in_figures,
)

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path: apt-get install chromium, or Chrome",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (WIDE, True), (PHONE, False)])
def test_everything_fits_can_be_read_and_is_drawn(
    browser: Browser, whole_study: Path, width: int, dark: bool
) -> None:
    tab = Tab(browser, whole_study / "report.html", width=width, dark=dark)
    assert check_reading(tab) > 800
    assert check_figures(tab, least_height=90) == 14
    if not dark:
        check_words_in_figures(tab)


def test_paper_shows_what_is_folded_and_cuts_no_figure(browser: Browser, whole_study: Path) -> None:
    tab = Tab(browser, whole_study / "report.html", width=WIDE, dark=True)
    shown = check_paper(tab)
    assert {"seed 2", "loss before", "versions.torch"} <= shown, "what is folded is lost on paper"
    sheets, parts = check_breaks(tab)
    assert 8 <= sheets <= 25
    assert parts >= 14 + 8
