"""The studies that come with aiether, and how a name becomes a specification."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from aiether.training.coerce import unknown
from aiether.training.settings_file import read_settings_file

from .spec import StudySpec, presets_of, read_spec
from .state import SPEC

SHIPPED = Path(str(files("aiether.study") / "shipped"))


def shipped_names() -> tuple[str, ...]:
    """The names of the shipped studies."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def find_spec(study: str, preset: str | None = None, *, default_preset: str | None = None) -> StudySpec:
    """The specification of a shipped study by name, of a YAML file, or of a study's folder.

    `default_preset` is taken where the file has it and no other is named.

    Raises
    ------
    ValueError
        For a name that is none of these, or a specification that cannot work.
    """
    path = find_file(study)
    known = presets_of(read_settings_file(path))
    if preset is None and default_preset in known:
        preset = default_preset
    return read_spec(path, preset)


def find_file(study: str) -> Path:
    """Where a study is specified."""
    path = Path(study).expanduser()
    if path.is_dir() and (path / SPEC).is_file():
        return path / SPEC
    if path.is_file():
        return path
    if study in shipped_names():
        return SHIPPED / f"{study}.yaml"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ValueError(
            f"study {study!r} does not exist; name a YAML file, a study's folder or a shipped study"
        )
    raise ValueError(unknown("study", study, shipped_names()))
