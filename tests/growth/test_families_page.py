"""docs/families.md shows what the tests know: its table is compared with what is found in the models."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families import FAMILY_TABLE, FamilyCase

from aiether.growth import family_of

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def _row(case: FamilyCase) -> str:
    family = family_of(case.build(2))
    value = {0.0: "", -1.0: " (with -1: used as 1 + w)"}[case.value]
    zeroed = [name for name, _ in family.identity] or family.output_projections
    filled = sorted({name.removesuffix(".weight").removesuffix(".bias") for name in zeroed})
    lists = ", ".join(f"`{key}`" for key in family.per_layer_keys)
    return (
        f"| {case.name} | `{family.blocks}` | {', '.join(f'`{name}`' for name in filled)}{value} | {lists} |"
    )


def test_the_table_on_the_page_is_what_the_models_say() -> None:
    rows = [
        "| Family | Blocks | `zero` fills | Lists that move with the layers |",
        "|---|---|---|---|",
        *map(_row, FAMILY_TABLE),
    ]
    match = re.search(r"<!-- families[^>]*-->\n(.*)<!-- /families -->", PAGE.read_text(), re.DOTALL)
    assert match is not None
    assert match[1].splitlines() == rows, "paste the right side into docs/families.md"
