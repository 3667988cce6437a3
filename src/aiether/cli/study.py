"""`aiether study list|run|status|report|compare`."""

from __future__ import annotations

import difflib
import glob
import itertools
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
import yaml
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from aiether.study.pool import Backend
    from aiether.study.spec import StudySpec
    from aiether.study.state import StudyState

from ._parse import parse

PROGRAM = "aiether study"
ABOUT = {
    "list": "the shipped studies, and what they cost on this machine",
    "run": "run what is missing of a study: a shipped one, a YAML file or a study's folder",
    "status": "how far a study is",
    "report": "write results.json, report.html and the tables anew from the records",
    "compare": "two studies or single runs side by side",
}
STUDIES = Path("runs/studies")
_WATCH_S = 2.0


@dataclass(frozen=True)
class RunFlags:
    study: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="STUDY", help="A shipped study's name, a YAML file or a study's folder."),
    ]
    preset: Annotated[
        str | None,
        tyro.conf.arg(help="One of the study's presets. None: gpu where there is a GPU, else cpu."),
    ] = None
    set: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="NAME=VALUE...", help="Settings of the base, as in --set dataset_path=a.txt lr=0.01."
        ),
    ] = ()
    output_dir: Annotated[
        str | None, tyro.conf.arg(help="The study's folder. None: runs/studies/NAME-PRESET.")
    ] = None
    workers: Annotated[
        int | None,
        tyro.conf.arg(help="Runs at a time. None: one for each GPU, or one on a processor; 64 Slurm jobs."),
    ] = None
    backend: Annotated[
        Literal["processes", "slurm", "submitit-local"],
        tyro.conf.arg(help="Processes of this machine, Slurm jobs, or submitit's own processes (no GPU)."),
    ] = "processes"
    slurm_partition: Annotated[str | None, tyro.conf.arg(help="Backend slurm: the partition.")] = None
    slurm_timeout_min: Annotated[int, tyro.conf.arg(help="Backend slurm: minutes of a job.")] = 240
    slurm_gpus: Annotated[int, tyro.conf.arg(help="Backend slurm: GPUs of a job.")] = 1
    slurm_cpus: Annotated[
        int, tyro.conf.arg(help="Backend slurm: cores of a job, and threads of a run in a new folder.")
    ] = 8


@dataclass(frozen=True)
class FolderFlags:
    study_dir: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY_DIR", help="The folder of a study.")
    ]


@dataclass(frozen=True)
class CompareFlags:
    folders: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="FOLDER...", help="Folders of studies or runs."),
    ]
    markdown: Annotated[bool, tyro.conf.arg(help="Print the table as Markdown.")] = False


@dataclass(frozen=True)
class ListFlags:
    """Nothing to choose."""


def run(arguments: Sequence[str]) -> int:
    """Do one of the commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_COMMANDS)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    return _COMMANDS[name](rest)


def _overview() -> str:
    lines = [f"  {name:9}{about}" for name, about in ABOUT.items()]
    return "\n".join([f"usage: {PROGRAM} COMMAND [flags]", "", "commands:", *lines])


def run_study_command(arguments: Sequence[str]) -> int:
    """`aiether study run`; 0, 3 if runs failed for good, 130 when a signal stopped it."""
    flags = parse(RunFlags, arguments, f"{PROGRAM} run", ABOUT["run"] + ".", usage="STUDY")
    import torch

    from aiether.study.catalogue import find_spec
    from aiether.study.runner import run_study
    from aiether.study.state import SPEC

    from ._study_display import StudyDisplay

    default = "gpu" if torch.cuda.is_available() else "cpu"
    spec = with_settings(find_spec(flags.study, flags.preset, default_preset=default), flags.set)
    given = Path(flags.study).expanduser()
    if flags.output_dir is not None:
        folder = Path(flags.output_dir).expanduser()
    elif (given / SPEC).is_file():
        folder = given
    else:
        folder = STUDIES / "-".join(filter(None, (spec.name, spec.preset)))
    display = StudyDisplay()
    command = f"{PROGRAM} run {shlex.quote(flags.study)}"
    command += f" --preset {spec.preset}" if spec.preset else ""
    command += f" --set {shlex.join(flags.set)}" if flags.set else ""
    try:
        result = run_study(
            spec,
            folder,
            display,
            workers=flags.workers,
            backend=backend(flags, spec, folder),
            threads=flags.slurm_cpus if flags.backend == "slurm" else None,
            command=command,
        )
    finally:
        display.close()
    if result.status == "interrupted":
        print(f"stopped and saved; go on with: {go_on(flags, folder)}")
        return result.exit_status
    for run_folder, reason in result.failures.items():
        print(f"failed: {run_folder}: {reason}")
    for verdict in verdicts(folder):
        print(verdict)
    print(f"report: {result.report}")
    return result.exit_status


def go_on(flags: RunFlags, folder: Path) -> str:
    """The command that runs the rest of a study, with as many workers and in the same place.

    What is run, the preset and the settings stand in the folder.
    """
    words = [PROGRAM, "run", shlex.quote(str(folder))]
    for field in fields(RunFlags):
        value = getattr(flags, field.name)
        where = field.name in ("workers", "backend") or field.name.startswith("slurm_")
        if where and value != field.default:
            words += [f"--{field.name}", shlex.quote(str(value))]
    return " ".join(words)


def with_settings(spec: StudySpec, given: Sequence[str]) -> StudySpec:
    """A study with other settings in its base, each as NAME=VALUE.

    Raises
    ------
    ValueError
        For a word without "=" or a value that is no YAML. What a setting may be is checked with the study.
    """
    settings = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: NAME=VALUE is meant, as in lr=0.01")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {word}: {value!r} is no value") from None
    for name in settings:
        overridden = all(name in each.settings for each in spec.all_conditions().values())
        if overridden or (name == "lr" and spec.tuning is not None):
            owner = "every condition has its own" if overridden else "tuning chooses it"
            raise ValueError(f"--set {name} would change nothing: {owner}; change it in a study's file")
    return replace(spec, base={**spec.base, **settings}) if settings else spec


def backend(flags: RunFlags, spec: StudySpec, folder: Path) -> Callable[[int], Backend] | None:
    """What makes the place where runs are done; None: processes of this machine.

    Raises
    ------
    ValueError
        For submitit's own processes where runs would take a GPU, and for a job without a core.
    """
    if flags.backend == "processes":
        return None
    from aiether.study.check import check_spec
    from aiether.study.jobs import FOLDER
    from aiether.study.runner import gpus
    from aiether.study.slurm import SubmititJobs

    parameters: dict[str, object] = {"timeout_min": flags.slurm_timeout_min}
    if flags.backend == "slurm":
        if flags.slurm_cpus < 1:
            raise ValueError(f"slurm_cpus is {flags.slurm_cpus}: at least 1 is needed")
        parameters |= {"slurm_partition": flags.slurm_partition, "gpus_per_node": flags.slurm_gpus}
        return lambda threads: SubmititJobs(
            folder / FOLDER, "slurm", flags.workers or 64, threads, parameters
        )
    if gpus(check_spec(spec)):
        raise ValueError(
            "backend submitit-local hides this machine's GPUs from its runs: take --backend processes, or "
            "--set device=cpu"
        )
    return lambda threads: SubmititJobs(folder / FOLDER, "local", flags.workers or 1, threads, parameters)


def verdicts(folder: Path) -> list[str]:
    """One line for each thing that a finished study found."""
    import json

    from aiether.study.state import RESULTS

    found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    pairs = [(f"{row['arm']} against {row['against']}", row["verdict"]) for row in found["comparisons"]]
    pairs += [(row["effect"], row["verdict"]) for row in found["factorial"] or ()]
    pairs += [(f"{row['arm']} against {row['against']}", row["verdict"]) for row in found["savings"]]
    return [f"{who}: {what}" for who, what in pairs]


def status_command(arguments: Sequence[str]) -> int:
    """`aiether study status`: live on a terminal while something runs, else once."""
    flags = parse(FolderFlags, arguments, f"{PROGRAM} status", ABOUT["status"] + ".", usage="STUDY_DIR")
    from aiether.study.state import study_state

    folder, console = _find_folder(flags.study_dir), Console()
    state = study_state(folder)
    if not console.is_terminal or not state.is_running:
        console.print(_status_table(state))
        return 0
    with Live(_status_table(state), console=console, auto_refresh=False) as live:
        while state.is_running:
            time.sleep(_WATCH_S)
            state = study_state(folder)
            live.update(_status_table(state), refresh=True)
    return 0


def _find_folder(word: str) -> Path:
    """A study's folder: a path, or the name that it has below runs/studies, with or without its preset."""
    from aiether.study.state import SPEC

    path = Path(word).expanduser()
    if (path / SPEC).is_file() or len(path.parts) > 1:
        return path
    found = sorted(each.parent for each in STUDIES.glob(f"{glob.escape(word)}*/{SPEC}"))
    exact = [each for each in found if each.name == word]
    if not exact and len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise ValueError(f"{word!r} is one of several studies in {STUDIES}: {names}; name one of them")
    return (exact or found or [path])[0]


def _status_table(state: StudyState) -> RenderableType:
    from aiether.training._format import duration

    from ._study_display import words

    left = state.time_left()
    counts = [
        f"{number} {status}"
        for status in ("finished", "running", "stopped", "failed", "waiting")
        if (number := state.count(status))
    ]
    title = f"{state.spec.name}: {', '.join(counts)}"
    if left:
        title += f"; about {duration(left)} left"
    table = Table("run", "state", "step", state.spec.metric, "trained", title=title, title_justify="left")
    for each in state.cells:
        step = f"{each.step:,}" + (f" of {each.total_steps:,}" if each.total_steps else "")
        metric = "" if each.metric is None else f"{each.metric:.4f}"
        took = "" if each.train_seconds is None else duration(each.train_seconds)
        words_of_state = each.status + (f": {each.reason}" if each.reason else "")
        table.add_row(words(each.cell), words_of_state, step if each.step else "", metric, took)
    return table


def report_command(arguments: Sequence[str]) -> int:
    """`aiether study report`."""
    flags = parse(FolderFlags, arguments, f"{PROGRAM} report", ABOUT["report"] + ".", usage="STUDY_DIR")
    from aiether.study.runner import report_study

    print(report_study(_find_folder(flags.study_dir)))
    return 0


def compare_command(arguments: Sequence[str]) -> int:
    """`aiether study compare`."""
    flags = parse(
        CompareFlags, arguments, f"{PROGRAM} compare", ABOUT["compare"] + ".", usage="FOLDER FOLDER..."
    )
    from aiether.study.compare import COLUMNS, markdown, sides

    if len(flags.folders) < 2:
        raise ValueError(f"one folder is nothing to compare; expected {PROGRAM} compare FOLDER FOLDER...")
    rows = [side for folder in flags.folders for side in sides(Path(folder).expanduser())]
    if flags.markdown:
        print(markdown(rows))
        return 0
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.words())
    Console().print(table)
    return 0


def list_command(arguments: Sequence[str]) -> int:
    """`aiether study list`."""
    parse(ListFlags, arguments, f"{PROGRAM} list", ABOUT["list"] + ".")
    from aiether.study.listing import listed
    from aiether.training._format import duration, scientific

    for name, entries in itertools.groupby(listed(), key=lambda each: each.name):
        table = Table("preset", "runs", "training FLOPs", "on this machine", title_justify="left")
        questions = []
        for each in entries:
            questions += [each.question] if each.question not in questions else []
            cost = "needs a GPU" if each.seconds is None else f"about {duration(each.seconds)}"
            flops = "by the clock" if each.flops is None else scientific(each.flops)
            table.add_row(each.preset or "", str(each.runs), flops, cost)
        print(f"{name}: {' '.join(questions)}")
        Console().print(table)
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_command,
    "run": run_study_command,
    "status": status_command,
    "report": report_command,
    "compare": compare_command,
}
