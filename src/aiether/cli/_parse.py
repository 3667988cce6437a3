"""tyro reads the flags; what it refuses is explained here in one line, in the words that files use too."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from aiether.training.coerce import coerce, describe, unknown

T = TypeVar("T")


def parse(
    flags: type[T],
    arguments: Sequence[str],
    program: str,
    description: str,
    *,
    types: Mapping[str, Any] | None = None,
    usage: str = "",
) -> T:
    """An instance of the dataclass `flags`; names may carry underscores or hyphens.

    `types` gives the type of every flag where `flags` nests them; `usage` names the positional arguments,
    with dots behind the last one if there may be several.

    Raises
    ------
    ValueError
        Naming the first argument that cannot be read, what is allowed and the nearest name.
    SystemExit
        With status 0, after printing the help.
    """
    refusal = io.StringIO()  # tyro explains in a box of several lines; ours is one line
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                flags,
                args=[_dotted(argument) for argument in arguments],
                prog=program,
                description=description,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    positional = [word.lower().removesuffix("...") for word in usage.split()]
    types = types or {k: v for k, v in get_type_hints(flags).items() if k not in positional}
    fault = explain(arguments, types) or (
        None if usage.endswith("...") else _unplaced(arguments, len(positional))
    )
    expected = f"expected {program} {usage} [flags]; " if usage else ""
    raise ValueError(fault or f"{expected}see {program} --help")


def _dotted(argument: str) -> str:
    """`--lahr_capacity` is `--lahr.capacity`."""
    for start in ("--lahr_", "--lahr-"):
        if argument.startswith(start):
            return "--lahr." + argument.removeprefix(start)
    return argument


def explain(arguments: Sequence[str], types: Mapping[str, Any]) -> str | None:
    """What is wrong with the first argument that does not fit `types`, or None if each fits by itself."""
    for flag, values in given_flags(arguments):
        name = setting_name(flag, types)
        if types.get(name) is bool:
            if values:
                return f"{flag} takes no value, not {values[0]!r}: write --{name} or --no_{name}"
        elif name not in types:
            return unknown("flag", flag, [f"--{known}" for known in types])
        elif fault := _fault(flag, values, types[name]):
            return fault
    return None


def _unplaced(arguments: Sequence[str], allowed: int) -> str | None:
    """The first word beyond the positional arguments, which come before any flag."""
    leading = list(itertools.takewhile(lambda argument: not argument.startswith("--"), arguments))
    return f"unexpected {leading[allowed]!r}" if len(leading) > allowed else None


def given_flags(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every flag as typed, with the words that follow it up to the next flag."""
    flag, values = "", list[str]()
    for argument in arguments:
        if not argument.startswith("--"):
            values.append(argument)
            continue
        if flag:
            yield flag, values
        flag, _, value = argument.partition("=")
        values = [value] if value else []
    if flag:
        yield flag, values


def setting_name(flag: str, types: Mapping[str, Any]) -> str:
    """The setting that a flag as typed is about: `--no-bf16` is about `bf16`."""
    name = flag.lstrip("-").replace("-", "_").replace("lahr.", "lahr_")
    positive = name.removeprefix("no_")
    return positive if types.get(positive) is bool else name


def _fault(flag: str, values: Sequence[str], hint: Any) -> str | None:
    many = any(get_origin(member) is tuple for member in (hint, *get_args(hint)))
    if not values and not many:
        return f"{flag} needs a value: {describe(hint)} is meant"
    if len(values) > 1 and not many:
        return f"unexpected {values[1]!r} after {flag} {values[0]}"
    try:
        coerce(flag, list(values) if many and len(values) != 1 else values[0], hint)
    except ValueError as error:
        return str(error)
    return None
