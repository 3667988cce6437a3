"""A word from a file or a command line as the type that a setting is declared with."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

_SHORT = reprlib.Repr()  # a value from a file may be anything, of any size and depth
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 2
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` (int, float, bool, str, None, Literal, tuple[T, ...] and unions of these).

    Numbers may be spelt as text, since YAML reads 1e-3 as text.

    Raises
    ------
    ValueError
        Naming the setting, the value and what is allowed.
    """
    try:
        return _coerce(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {_SHORT.repr(value)}: {describe(hint)} is meant") from None


def describe(hint: Any) -> str:
    """What a type allows, in words."""
    origin: Any = get_origin(hint)
    arguments: tuple[Any, ...] = get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in arguments)
    if origin is Literal:
        choices = ", ".join(str(choice) for choice in arguments)
        return f"one of {choices}" if "," in choices else repr(choices)
    if origin is tuple:
        return f"a list ({describe(arguments[0])} each)"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "nothing (null)",
    }
    return words[hint]


_FEW = 8
"""Up to so many names an error lists them all."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one that does, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if not known:
        return f"unknown {what} {_SHORT.repr(name)}: there are none"
    if len(known) <= _FEW:
        hint += f"{' It is' if near else '; choose'} one of {', '.join(known)}"
    return f"unknown {what} {_SHORT.repr(name)}{hint or '; aiether train --help lists them'}"


def _coerce(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first(value, arguments)
    if origin is Literal:
        return _literal(value, arguments)
    if origin is tuple:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return tuple(_coerce(item, arguments[0]) for item in items)
    return _SCALARS[hint](value)


def _first(value: Any, members: Sequence[Any]) -> Any:
    """The first member of a union that takes the value.

    Text comes late, since it would take any word, and a list last, since it would take any one item.
    """
    for member in sorted(members, key=lambda member: (get_origin(member) is tuple, member is str)):
        try:
            return _coerce(value, member)
        except (TypeError, ValueError):
            continue
    raise ValueError(value)


def _literal(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    raise ValueError(value)


def _none(value: Any) -> None:
    if value is not None and value not in ("None", "null"):
        raise ValueError(value)


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    return _instance(value, bool)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def _instance(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


_SCALARS: dict[Any, Any] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: lambda value: _instance(value, str),
    type(None): _none,
}
