"""A study's folder: what was said when it began, and whether what lies in it still belongs to it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from aiether.integrations import write_json
from aiether.retrofitting.arm_text import TUNED_ON
from aiether.training.config import read_config

from .arms import Cell, cell_config
from .check import Arm
from .results import spec_hash
from .spec import StudySpec, plain, read_spec
from .state import ABOUT, SPEC

_TEMPORARY = f".{SPEC}.tmp"
_FREE = frozenset({"output_dir", "cache_dir", "preset"})
"""Settings of a run that change nothing in it."""


def check_folder(spec: StudySpec, study_dir: Path) -> None:
    """Raise ValueError if the folder holds another study, or something that is none."""
    path = study_dir / SPEC
    if path.is_file():
        before = read_spec(path)
        if spec_hash(before) != spec_hash(spec):
            theirs, ours = plain(before), plain(spec)
            differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            raise ValueError(
                f"{str(study_dir)!r} holds a study that differs in {', '.join(differing)}; name another "
                "output_dir, or run that one again from its own study.yaml"
            )
        return
    others = sorted(entry.name for entry in study_dir.iterdir() if entry.name not in ("run.lock", _TEMPORARY))
    if others:
        raise ValueError(
            f"output_dir {str(study_dir)!r} holds {others[0]} and no study; name a new or an empty folder"
        )


def begin(spec: StudySpec, study_dir: Path, arms: Mapping[str, Arm], command: str | None) -> None:
    """Write study.yaml and about.json where there are none; take away what killed processes left."""
    path, about = study_dir / SPEC, study_dir / ABOUT
    if not path.is_file():
        content = json.loads(json.dumps(plain(spec)))  # no object twice in it: YAML would name it only once
        temporary = path.with_name(_TEMPORARY)
        with temporary.open("w", encoding="utf-8") as file:
            yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    if not about.is_file():
        command = command or f"aiether study run {shlex.quote(str(path))}"
        facts = {name: arm.facts() for name, arm in arms.items()}
        write_json(about, {"command": command, "preset": spec.preset, "arms": facts})
    for left_over in study_dir.glob("cells/*/.warm-*"):
        shutil.rmtree(left_over)


def read_about(study_dir: Path) -> dict[str, Any]:
    """The command, the preset and the arms' models that a study began with.

    Raises
    ------
    ValueError
        If it never began.
    """
    path = study_dir / ABOUT
    if not path.is_file():
        raise ValueError(f"the study in {str(study_dir)!r} has not begun; aiether study run {study_dir}")
    return json.loads(path.read_text(encoding="utf-8"))


def check_cells(
    spec: StudySpec,
    study_dir: Path,
    wanted: Iterable[Cell],
    fingerprint: str,
    own_texts: Mapping[str, str | None],
) -> None:
    """See that the runs which are there are those that the study would run now, on the same data.

    A preset may have changed with the version, or a text on the disk: such runs would be paired with others.

    Args:
        fingerprint: of the study's data.
        own_texts: of what a condition is tuned on, where that is another text.

    Raises
    ------
    ValueError
        Naming the run and the settings.
    """
    for cell in wanted:
        folder = study_dir / cell.folder
        if not (folder / "config.yaml").is_file():
            continue
        before, now = asdict(read_config(folder / "config.yaml")), asdict(cell_config(spec, cell))
        differing = [
            f"{name} ({before[name]}, now {now[name]})"
            for name in now
            if name not in _FREE and before[name] != now[name]
        ]
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        if environment["data"]["fingerprint"] != fingerprint:
            differing.append("its data")
        if environment.get(TUNED_ON, {}).get("fingerprint") != own_texts.get(cell.condition):
            differing.append("what it is tuned on")
        if differing:
            raise ValueError(
                f"the run in {str(folder)!r} differs from what the study would run now in "
                f"{', '.join(differing)}: runs of one study must not; restore it, or begin the study anew in "
                "another output_dir"
            )
