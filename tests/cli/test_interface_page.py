"""docs/interface.md says what the code does."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from aiether.cli._main import COMMANDS
from aiether.cli.evaluate import EvaluateFlags
from aiether.cli.generate import GenerateFlags
from aiether.training.config import PRESETS, GrowthConfig

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "interface.md").read_text(encoding="utf-8")


def test_the_tables_of_flags_are_current() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "interface_tables.py"))
    assert script["page_with_tables"](PAGE) == PAGE, "run: python scripts/interface_tables.py"


def test_every_command_preset_and_sampling_flag_is_on_the_page() -> None:
    for name in COMMANDS:
        assert f"`aiether {name} " in PAGE
    for name in PRESETS:
        assert f"`{name}`" in PAGE
    for flags in (GenerateFlags, EvaluateFlags):
        for name in set(flags.__dataclass_fields__) - {"path", "prompt"}:
            assert f"| `--{name}` |" in PAGE.partition(f"`aiether {flags.__module__.split('.')[-1]}`\n")[2]


def test_the_documented_ranges_are_those_that_warn() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if " to " in line and line.startswith("| `")]
    ranges = {
        row[1].strip(" `"): [float(edge) for edge in row[2].split(" to ")] for row in rows if len(row) == 4
    }
    assert len(ranges) == 10
    for name, (low, high) in ranges.items():
        for value, warns in ((low, False), (high, False), (low * 0.5, True), (high * 2, True)):
            kind = type(getattr(GrowthConfig(), name))
            given: dict[str, Any] = {name: kind(value)}
            assert any(name in line for line in GrowthConfig(**given).out_of_range()) == warns
