"""Colours by role, and SVG that follows the theme of the page around it.

Figures are drawn in the light palette. In the SVG each of its colours becomes a CSS variable, so that one
drawing serves light, dark and print. The palettes stay apart under the common forms of colour blindness, and
lines differ in dash as well as in colour.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

LIGHT: dict[str, str] = {
    "paper": "#ffffff",
    "ink": "#1c2127",
    "muted": "#5a6470",
    "axis": "#a4adb8",
    "grid": "#e6e9ed",
    "grown": "#0a66b2",
    "static": "#c44e05",
    "other": "#8350b0",
    "growth": "#00785c",
    "threshold": "#b01f6f",
    "age0": "#33418f",
    "age1": "#0a7fb4",
    "age2": "#03937c",
    "age3": "#5d9b2f",
    "age4": "#b38600",
    "age5": "#c04a0a",
    "arm0": "#bf4a00",
    "arm1": "#0062b5",
    "arm2": "#569a81",
    "arm3": "#bd62f6",
    "arm4": "#a7882c",
    "arm5": "#5b2995",
    "arm6": "#801c4e",
    "arm7": "#607633",
    "arm8": "#0f516f",
    "arm9": "#6a3e18",
}
DARK: dict[str, str] = {
    "paper": "#14181d",
    "ink": "#e7eaee",
    "muted": "#9ea8b4",
    "axis": "#55606d",
    "grid": "#282f37",
    "grown": "#58b0f2",
    "static": "#f09a55",
    "other": "#c39be8",
    "growth": "#3fcaa0",
    "threshold": "#f083bd",
    "age0": "#93a1f2",
    "age1": "#4db4e8",
    "age2": "#33c7ab",
    "age3": "#97d168",
    "age4": "#e8c04c",
    "age5": "#f29150",
    "arm0": "#f2984f",
    "arm1": "#56aef0",
    "arm2": "#457f6a",
    "arm3": "#eacfff",
    "arm4": "#f9ce56",
    "arm5": "#9761e2",
    "arm6": "#d3538d",
    "arm7": "#a2b680",
    "arm8": "#2a89b8",
    "arm9": "#936642",
}
NUM_AGES = 6
ARM_DASHES = ("line", "line", "line", "line", "dash", "dash", "dash", "dot-dash", "dot-dash", "dot-dash")
"""How the lines of `arm0` to `arm9` are drawn: those of one dash stay apart under any colour blindness."""

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aiether",  # equal drawings give equal ids
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["axis"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["axis"],
    "ytick.color": LIGHT["axis"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "path.simplify": False,
    "text.parse_math": False,  # a name may hold a dollar
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's settings while figures are drawn and written, whatever the caller's own are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


@dataclass(frozen=True)
class LegendEntry:
    """A line of the legend, in the page's own text.

    `mark`: line, dash, dot-dash, dots, bar, or a point: disc, square, triangle, diamond.
    """

    label: str
    role: str
    mark: str = "line"


@dataclass(frozen=True)
class Picture:
    """A drawn figure with the words around it. `tips` are tool tips by the `gid` of what they belong to."""

    key: str
    title: str
    caption: str
    description: str
    figure: Figure
    legend: tuple[LegendEntry, ...] = ()
    tips: Mapping[str, str] = field(default_factory=dict)


def css_variables(palette: Mapping[str, str]) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--{role}: {colour};" for role, colour in palette.items())


def to_svg(picture: Picture) -> str:
    """The picture as an inline `<svg>`: coloured by variables, in the page's font, as wide as its place."""
    root = _drawn(picture.figure)
    _own_ids(root, prefix=picture.key)
    _restyle(root)
    for element in root.iter():
        tip = picture.tips.get(element.get("id", "").removeprefix(f"{picture.key}-"))
        if tip is not None:
            _insert_text(element, "title", tip)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{picture.key}-title",
    }
    _insert_text(root, "desc", picture.description)
    _insert_text(root, "title", picture.title).set("id", f"{picture.key}-title")
    return ET.tostring(root, encoding="unicode")


def standalone_svg(picture: Picture, svg: str | None = None, *, legend: bool = False) -> str:
    """The picture as a file of its own that follows the light or dark theme of whoever shows it.

    `svg` is what `to_svg` made of the picture, if that is at hand; `legend` writes the legend below it.
    """
    root = ET.fromstring(svg or to_svg(picture))
    root.set("xmlns", "http://www.w3.org/2000/svg")
    if legend:
        _append_legend(root, picture.legend)
    _insert_text(
        root,
        "style",
        f"svg {{ {css_variables(LIGHT)} font-family: system-ui, sans-serif; background: var(--paper); }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {css_variables(DARK)} }} }} "
        "* { stroke-linejoin: round; }",
    )
    return ET.tostring(root, encoding="unicode") + "\n"


LEGEND_LINE = 17.0  # units from one line of a legend to the next
POINTS = {
    "disc": "M9.5 5a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0",
    "square": "M10 1h8v8h-8z",
    "triangle": "M14 0.5l5 9h-10z",
    "diamond": "M14 0l5 5l-5 5l-5 -5z",
}
"""The forms of points in a swatch of 28 by 10 units."""
_SWATCH_DASHES = {"dash": "8 3", "dot-dash": "8 3 2 3", "dots": "2 2.6"}


def legend_columns(entries: Sequence[LegendEntry]) -> int:
    """Two, if every label is short enough for half the width of a figure."""
    return 2 if max((len(entry.label) for entry in entries), default=0) <= 28 else 1


def _append_legend(root: ET.Element, entries: Sequence[LegendEntry]) -> None:
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    columns = legend_columns(entries)
    lines = -(-len(entries) // columns)
    root.set("viewBox", f"{left:g} {top:g} {width:g} {height + lines * LEGEND_LINE + 8:g}")
    for index, entry in enumerate(entries):
        x, y = 8 + (index % columns) * width / columns, height + 4 + (index // columns) * LEGEND_LINE
        group = ET.SubElement(root, "g", transform=f"translate({x:g} {y:g})")
        group.append(_swatch(entry))
        words = ET.SubElement(group, "text", x="36", y="9", style="font-size: 11px; fill: var(--ink)")
        words.text = entry.label


def _swatch(entry: LegendEntry) -> ET.Element:
    if entry.mark in POINTS:
        return ET.Element("path", d=POINTS[entry.mark], style=f"fill: var(--{entry.role})")
    style = f"stroke: var(--{entry.role}); stroke-width: {5 if entry.mark == 'bar' else 2}"
    if entry.mark in _SWATCH_DASHES:
        style += f"; stroke-dasharray: {_SWATCH_DASHES[entry.mark]}"
    return ET.Element("line", x1="2", x2="26", y1="5", y2="5", style=style)


def _drawn(figure: Figure) -> ET.Element:
    buffer = io.StringIO()
    figure.set_canvas(FigureCanvasSVG(figure))
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for child in [child for child in root if child.tag == "metadata"]:
        root.remove(child)
    for parent in list(root.iter("defs")):
        for style in parent.findall("style"):  # it would restyle the whole page
            parent.remove(style)
    return root


def _own_ids(root: ET.Element, prefix: str) -> None:
    """Several drawings share one page: their ids and references get a prefix of their own."""
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == "href":
                element.set(name, f"#{prefix}-{value.removeprefix('#')}")
            else:
                element.set(name, value.replace("url(#", f"url(#{prefix}-"))


_VARIABLES = {colour: f"var(--{role})" for role, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r"font: (?:[a-z]+ )*?(?:(\d{3}) )?([\d.]+)px [^;]*")
_FAMILY = re.compile(r" ?font-family: [^;]*;?")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def _restyle(root: ET.Element) -> None:
    for element in root.iter():
        if style := element.get("style"):
            style = _COLOUR.sub(lambda match: _VARIABLES[match[0]], style)
            element.set("style", _FAMILY.sub("", _FONT.sub(_own_font, style)))
        for name in ("d", "x", "y", "transform", "points"):
            if value := element.get(name):
                element.set(name, _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value))


def _own_font(match: re.Match[str]) -> str:
    """Size and weight alone, from the `font` shorthand that matplotlib wrote before 3.11."""
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"


def _insert_text(element: ET.Element, tag: str, text: str) -> ET.Element:
    child = ET.Element(tag)
    child.text = text
    element.insert(0, child)
    return child
