"""Writes the tables of flags in docs/interface.md from the code, after a setting or preset has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiether.cli._settings import ABOUT, GROUPS, flag_name
from aiether.training.coerce import describe
from aiether.training.config import TrainConfig, merge, setting_types

PAGE = Path(__file__).parents[1] / "docs" / "interface.md"
BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"


def tables() -> str:
    """One table per group of settings: name, what is allowed, two defaults, meaning."""
    report, recommended = merge("report", {}, {}), merge("recommended", {}, {})
    parts: list[str] = []
    for group, helps in GROUPS.items():
        rows = [_row(name, text, report, recommended) for name, text in helps.items()]
        parts.append(
            "\n".join(
                [
                    f"### {group.capitalize()}",
                    "",
                    ABOUT[group],
                    "",
                    "| Flag | Value | `report` | `recommended` | Meaning |",
                    "|---|---|---|---|---|",
                    *rows,
                ]
            )
        )
    return "\n\n".join(parts)


def page_with_tables(page: str) -> str:
    """The page with what lies between its two markers replaced by the current tables."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _row(name: str, text: str, report: TrainConfig, recommended: TrainConfig) -> str:
    allowed = describe(setting_types()[name]).removeprefix("one of ").replace(" or nothing (null)", "")
    values = " | ".join(_shown(getattr(config, name)) for config in (report, recommended))
    return f"| `--{flag_name(name)}` | {allowed} | {values} | {text} |"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
