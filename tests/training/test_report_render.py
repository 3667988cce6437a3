"""The report in a real browser: wide, on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.training.browser import Browser, Tab, find_chromium
from tests.training.fake_runs import STATIC, FakeRun, write_fake_run

from aiether.training.report import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path: apt-get install chromium, or Chrome",
)
PHONE, WIDE = 390, 1280
LONG = "a-name-without-any-place-to-break-it-" * 8

# Texts as they are drawn: HTML text nodes and the words in drawings, what cannot be seen left out.
TEXTS = """
(() => {
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const luminance = rgb => rgb.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = element => {
    for (let at = element; at; at = at.parentElement) {
      const rgba = parse(getComputedStyle(at).backgroundColor);
      if (rgba.length === 3 || rgba[3] > 0) return rgba;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || element.closest('title, desc, style')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!box.width || !element.checkVisibility()) continue;
    const drawing = element.closest('figure > svg'), style = getComputedStyle(element);
    const scale = drawing ? drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width : 1;
    const [a, b] = [parse(drawing ? style.fill : style.color), paper(element)].map(luminance);
    found.push({
      text: node.data.trim(), drawing: drawing ? drawing.parentElement.id : '',
      px: parseFloat(style.fontSize) * scale, inScroller: !!element.closest('.scroll'),
      contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
      left: box.left, right: box.right, top: box.top + scrollY, bottom: box.bottom + scrollY,
    });
  }
  return found;
})()
"""
FIGURES = """
[...document.querySelectorAll('figure > svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const lines = [...svg.querySelectorAll('path')].filter(path => path.getTotalLength() > 50);
  return {key: svg.parentElement.id, width: box.width, height: box.height, lines: lines.length};
})
"""
CUT_TABLES = """
[...document.querySelectorAll('.scroll')]
  .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth).map(box => box.innerText)
"""
# Links at the top and the foot of each part: where they stand in the PDF tells how the part was broken.
PROBES = """
document.querySelectorAll('figure, article').forEach((part, i) => {
  for (const [end, place] of [['top', 'afterbegin'], ['foot', 'beforeend']])
    part.insertAdjacentHTML(place, `<a href="https://probe.test/${i}/${end}" style="font-size:1pt">.</a>`);
})
"""


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


def words(texts: list[dict[str, Any]]) -> list[str]:
    return [f"{text['text']!r} in {text['drawing'] or 'the page'}" for text in texts]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_everything_fits_and_can_be_read(open_page: OpenPage, width: int, dark: bool) -> None:
    tab = open_page(width=width, dark=dark)
    page: dict[str, int] = tab.ask(
        "({scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth})"
    )
    assert page["scroll"] <= page["client"], "the page scrolls sideways"
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    assert len(texts) > 200
    assert words([text for text in texts if text["contrast"] < 4.5]) == []
    outside = [text for text in texts if text["left"] < 0 or text["right"] > page["client"]]
    assert words([text for text in outside if not text["inScroller"]]) == []
    assert words([text for text in texts if text["px"] < 9]) == []
    assert tab.ask(CUT_TABLES) == []
    assert tab.complaints() == []


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_the_figures_are_drawn_and_their_words_do_not_collide(open_page: OpenPage, width: int) -> None:
    tab = open_page(width=width)
    figures: list[dict[str, Any]] = tab.ask(FIGURES)
    assert len(figures) >= 11
    for figure in figures:
        assert figure["width"] > 300, figure
        assert figure["height"] > 150, figure
        assert figure["lines"] >= 2, figure
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    collisions = [
        f"{one['text']!r} and {other['text']!r} in {one['drawing']}"
        for i, one in enumerate(texts)
        for other in texts[:i]
        if one["drawing"] and one["drawing"] == other["drawing"] and _overlap(one, other)
    ]
    assert collisions == []


def _overlap(one: dict[str, Any], other: dict[str, Any], slack: float = 3.0) -> bool:
    """Boxes of text have space above and below their letters: the slack."""
    across = min(one["right"], other["right"]) - max(one["left"], other["left"])
    down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return across > 0 and down > slack


def test_dark_and_light_differ_in_paper_and_ink(open_page: OpenPage) -> None:
    script = "getComputedStyle(document.body).backgroundColor"
    assert open_page(width=WIDE).ask(script) == "rgb(255, 255, 255)"
    assert open_page(width=WIDE, dark=True).ask(script) == "rgb(20, 24, 29)"


def test_paper_is_light_shows_the_record_and_cuts_no_figure(open_page: OpenPage) -> None:
    tab = open_page(width=WIDE, dark=True)
    tab.media(dark=True, kind="print")
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    assert words([text for text in texts if text["contrast"] < 4.5]) == []
    shown = {text["text"] for text in texts}
    grew = [text for text in shown if re.fullmatch(r"grew \d+→\d+ layers, which took 0.41 s", text)]
    assert grew, "what is folded is lost on paper"
    assert "kappa_crit" in shown
    tab.ask(PROBES)
    tab.media()
    pages = probes_by_page(tab.pdf())
    assert 4 <= len(pages) <= 12
    ends = {probe: number for number, probes in enumerate(pages) for probe in probes}
    parts = {probe.partition("/")[0] for probe in ends}
    assert len(parts) >= 11 + 4
    cut = [part for part in parts if ends[f"{part}/top"] != ends[f"{part}/foot"]]
    assert cut == []


def probes_by_page(pdf: bytes) -> list[list[str]]:
    """The probes that lie on each page of a PDF as Chromium writes it: every object in the open."""
    objects = dict(re.findall(rb"(\d+) 0 obj\s*(.*?)endobj", pdf, flags=re.S))
    pages = [body for body in objects.values() if re.search(rb"/Type\s*/Page\b", body)]
    found: list[list[str]] = []
    for page in pages:
        listed = re.search(rb"/Annots\s*\[(.*?)\]", page, flags=re.S)
        numbers = re.findall(rb"(\d+) 0 R", listed[1]) if listed else []
        uris = [re.search(rb"/URI\s*\(https://probe\.test/([^)]*)\)", objects[number]) for number in numbers]
        found.append([uri[1].decode() for uri in uris if uri])
    return found
