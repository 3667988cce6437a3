"""Tables as plain values: what HTML and Markdown show alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiether.training import _format as fmt


@dataclass(frozen=True)
class Grid:
    """A table: names of the columns, and rows of cells as they are shown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def settings(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """A configuration or an environment as pairs, nested ones by dotted names."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += [(f"{key}.{name}", text) for name, text in settings(value)]
        else:
            pairs.append((str(key), fmt.anything(value)))
    return tuple(pairs)
