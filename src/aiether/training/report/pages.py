"""Pages in the house's style: one file that loads nothing, and how it comes onto the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aiether.training.report.theme import DARK, LIGHT, POINTS, Picture, css_variables, to_svg


def environment(*packages: str) -> Environment:
    """The templates of `packages` and of this one; every text that is put into them is escaped."""
    env = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in (*packages, "aiether.training.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    palettes = {"light": Markup(css_variables(LIGHT)), "dark": Markup(css_variables(DARK))}
    env.globals |= {**palettes, "points": POINTS}
    return env


def inline(pictures: Iterable[Picture]) -> list[tuple[Picture, Markup]]:
    """Each picture with its drawing, as the template takes them."""
    return [(picture, Markup(to_svg(picture))) for picture in pictures]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # what a full disk left of it
