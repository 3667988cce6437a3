"""The measured figures of README and docs are those of the committed results."""

from __future__ import annotations

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_measured_figures_are_current() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "measured.py"))
    pages = {"README.md", *(f"docs/{name}.md" for name in ("studies", "adaptive", "prosqa", "toroidal"))}
    assert set(script["PAGES"]) == pages
    for name, measured in script["PAGES"].items():
        page = (REPOSITORY / name).read_text(encoding="utf-8")
        assert script["with_measured"](page, measured) == page, f"{name}: run python scripts/measured.py"


def test_every_link_leads_somewhere() -> None:
    import re

    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
