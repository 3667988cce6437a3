"""`aiether train`: preset, file and flags become one configuration; or a run goes on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aiether.training.config import (
    DEFAULT_PRESET,
    PRESETS,
    RangeWarning,
    TrainConfig,
    merge,
    read_file,
    resolve,
    setting_types,
)

from ._parse import given_flags, parse, setting_name
from ._settings import settings_dataclass, values_of

if TYPE_CHECKING:
    from aiether.training.run import RunResult

PROGRAM = "aiether train"


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """Where the settings come from: preset, then file, then flags; or a run that goes on."""

    preset: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help=f"Settings to start from: {', '.join(PRESETS)}.")
    ] = None
    config: Annotated[
        str | None, tyro.conf.arg(metavar="FILE", help="A YAML file of settings; flags win over it.")
    ] = None
    resume: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="RUN_DIR",
            help="Go on with an interrupted run, with its own settings; few may be changed with it: on_nan, "
            "and what eases memory.",
        ),
    ] = None


def run(arguments: Sequence[str]) -> int:
    """Train or resume; 0 when the run finished, 130 or 143 when a signal ended it (and it was saved)."""
    return train(arguments).exit_status


def train(arguments: Sequence[str], *, default_preset: str = DEFAULT_PRESET) -> RunResult:
    """Do what a command line says.

    Raises
    ------
    ValueError
        For a command line, file or setting that cannot work, before anything is written.
    """
    source = read_source(arguments)
    if source.resume is not None and "--help" not in arguments:
        from aiether.training import run as job

        return job.resume(Path(source.resume), _changes(arguments))
    config = read_settings(arguments, source, default_preset=default_preset)
    from aiether.training import run as job  # after the command line is known to be right: it takes seconds

    return job.train(config)


def read_source(arguments: Sequence[str]) -> SourceFlags:
    """`--preset`, `--config` and `--resume` of a command line whose other flags are read later."""
    names = {setting.name for setting in fields(SourceFlags)}
    own = [
        part
        for flag, values in given_flags(arguments)
        if setting_name(flag, {}) in names
        for part in (flag, *values)
    ]
    return parse(SourceFlags, own, PROGRAM, "")


def read_settings(
    arguments: Sequence[str], source: SourceFlags, *, default_preset: str = DEFAULT_PRESET
) -> TrainConfig:
    """The configuration of a command line; values outside a documented range give a line on stderr."""
    file = read_file(source.config) if source.config is not None else {}
    preset = source.preset if source.preset is not None else file.get("preset", default_preset)
    base = merge(preset, file, {})
    given = _given(
        arguments,
        base,
        "Train a language model that starts small and grows when the geometry of its weights says so. "
        f"The defaults shown are those of preset {preset!r}.",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RangeWarning)
        config = resolve(preset, file, given)
    for warning in caught:
        print(f"{PROGRAM}: warning: {warning.message}", file=sys.stderr)
    return config


def _given(arguments: Sequence[str], base: TrainConfig, about: str) -> dict[str, Any]:
    """The settings that a command line names, with their values."""
    types = {**setting_types(), **{setting.name: str for setting in fields(SourceFlags)}}
    flags: Any = parse(settings_dataclass(base, SourceFlags), arguments, PROGRAM, about, types=types)
    typed = {setting_name(flag, types) for flag, _ in given_flags(arguments)}
    return {name: value for name, value in values_of(flags).items() if name in typed}


def _changes(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line names beside --resume."""
    others = [flag for flag, _ in given_flags(arguments) if setting_name(flag, {}) in ("config", "preset")]
    if not arguments[0].startswith("--"):
        others.insert(0, repr(arguments[0]))
    if others:
        raise ValueError(
            f"--resume goes on with the run's own settings; remove {', '.join(others)}, or start a new run"
        )
    return _given(arguments, merge(DEFAULT_PRESET, {}, {}), "")
