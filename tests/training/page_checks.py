"""What every page has to stand in a real browser: it fits, can be read, is drawn whole and breaks well."""

from __future__ import annotations

import re
from typing import Any

from tests.training.browser import Tab

PHONE, WIDE = 390, 1280

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


def words(texts: list[dict[str, Any]]) -> list[str]:
    return [f"{text['text']!r} in {text['drawing'] or 'the page'}" for text in texts]


def check_reading(tab: Tab) -> int:
    """Everything is inside the page and can be read; returns how many texts there are."""
    page: dict[str, int] = tab.ask(
        "({scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth})"
    )
    assert page["scroll"] <= page["client"], "the page scrolls sideways"
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    assert words([text for text in texts if text["contrast"] < 4.5]) == []
    outside = [text for text in texts if text["left"] < 0 or text["right"] > page["client"]]
    assert words([text for text in outside if not text["inScroller"]]) == []
    assert words([text for text in texts if text["px"] < 9]) == []
    assert tab.ask(CUT_TABLES) == []
    assert tab.complaints() == []
    return len(texts)


def check_figures(tab: Tab, least_height: int = 150) -> int:
    """Every figure is drawn, with lines in it; returns how many there are."""
    figures: list[dict[str, Any]] = tab.ask(FIGURES)
    for figure in figures:
        assert figure["width"] > 300, figure
        assert figure["height"] > least_height, figure
        assert figure["lines"] >= 2, figure
    return len(figures)


def check_words_in_figures(tab: Tab) -> None:
    """No two words of a figure lie on each other."""
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


def check_paper(tab: Tab) -> set[str]:
    """On paper a dark page is light; returns the texts that stand on it."""
    tab.media(dark=True, kind="print")
    texts: list[dict[str, Any]] = tab.ask(TEXTS)
    assert words([text for text in texts if text["contrast"] < 4.5]) == []
    return {text["text"] for text in texts}


def check_breaks(tab: Tab) -> tuple[int, int]:
    """No figure and no article is cut by the end of a sheet; returns how many sheets and parts there are."""
    tab.ask(PROBES)
    tab.media()
    pages = probes_by_page(tab.pdf())
    ends = {probe: number for number, probes in enumerate(pages) for probe in probes}
    parts = {probe.partition("/")[0] for probe in ends}
    assert [part for part in parts if ends[f"{part}/top"] != ends[f"{part}/foot"]] == []
    return len(pages), len(parts)


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
