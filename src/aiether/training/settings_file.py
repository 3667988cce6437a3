"""A YAML file of settings, read as what it is: one flat mapping of names to plain values.

YAML can do more than that, and each of the rest is a trap: tags that build objects, aliases that unfold to
gigabytes, keys given twice of which the last one silently wins. Here they are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 16
"""A file of every setting takes 3 kB."""

_LINES = "write lines of the form 'lr: 0.001'"
_BEYOND_YAML = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
)  # PyYAML's own constructors, given a tag such as !!int before a value that is none


class _Settings(yaml.SafeLoader):
    """Plain values only: no aliases, no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read: write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice: keep one", problem_mark=key.start_mark
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def read_settings_file(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; an empty one has none.

    Raises
    ------
    ValueError
        Naming the file, and the line and column where there is one: it is missing, too large, no text, no
        YAML, or holds something other than names and values.
    """
    what = f"config file {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{what} does not exist; name a YAML file such as a run's config.yaml")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{what} is larger than {MAX_BYTES >> 10} KiB: it holds no settings; {_LINES}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Settings)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (byte {error.start}); {_LINES}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{what}: {explain(error)}") from error
    except RecursionError:
        raise ValueError(f"{what} nests too deeply; {_LINES}") from None
    except _BEYOND_YAML as error:
        raise ValueError(f"{what} holds a value that does not fit its tag; {_LINES}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{what}: it holds no settings; {_LINES}")
    return {str(key): value for key, value in content.items()}


def explain(error: yaml.YAMLError) -> str:
    """What PyYAML says over several lines, in one: where, what, and what to do."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "it is no YAML"
        advice = "; indent with spaces" if "'\\t'" in problem else ""
        return f"{where}{problem}{advice}"
    return f"it is no YAML text ({' '.join(str(error).split())[:120]}); {_LINES}"
