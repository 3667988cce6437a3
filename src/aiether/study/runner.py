"""Carry a study out: what is missing is run, what failed is tried once more, what is there is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from aiether.data import prepare
from aiether.integrations import hold, raise_interrupts, write_json
from aiether.training._format import duration, scientific
from aiether.training.config import TrainConfig

from .arms import Cell, cells, tuning_cells
from .check import check_arms, check_spec
from .folder import begin, check_cells, check_folder, read_about
from .jobs import FOLDER as JOBS_FOLDER
from .jobs import end_left_jobs
from .pool import Backend, LocalWorkers
from .pretraining import pretrain
from .queue import Nobody, Observer, Queue, Study
from .report import write_study_report
from .results import choose_rates, collect
from .spec import StudySpec
from .state import RESULTS, WORKERS, append_attempts_mark, open_study, study_state, untuned

INTERRUPTED, SOME_FAILED = 130, 3


@dataclass(frozen=True)
class StudyResult:
    """How a study ended, and where what it found lies. `failures`: run folders without a result, and why."""

    study_dir: Path
    status: Literal["finished", "interrupted"]
    failures: Mapping[str, str]
    report: Path | None
    exit_status: int


def run_study(
    spec: StudySpec,
    study_dir: str | Path,
    observer: Observer | None = None,
    *,
    workers: int | None = None,
    backend: Callable[[int], Backend] | None = None,
    threads: int | None = None,
    command: str | None = None,
) -> StudyResult:
    """Run what is missing of a study in `study_dir`, then write results.json and the report.

    Parameters
    ----------
    observer: who is told how it goes on; None: nobody.
    workers: processes at a time; None: one for each GPU, or one on a processor. A folder keeps the number
        of threads that its first runs had, since sums depend on it.
    backend: makes the place where runs are done from the threads of a run; None: processes of this machine.
    threads: of a run in a folder that is new, where runs are done elsewhere; None: its share of this machine.
    command: what a reader types to run it again.

    Raises
    ------
    ValueError
        For a specification, data or a folder that cannot work, before anything runs.
    """
    study_dir, observer = Path(study_dir), observer or Nobody()
    configs = check_spec(spec)
    with hold(study_dir), raise_interrupts():
        check_folder(spec, study_dir)
        study = look_at(spec, study_dir, configs, observer)
        begin(spec, study_dir, study.arms, command)
        place = _place(study, workers, threads, backend, observer)
        queue = Queue(study, place, observer)
        observer.message(_cost_words(study))
        append_attempts_mark(study_dir)
        try:
            chosen = _train(study, queue, place, observer)
        except KeyboardInterrupt as stop:
            failures = {cell.folder: reason for cell, reason in queue.failures.items()}
            status = getattr(stop, "exit_status", INTERRUPTED)
            return StudyResult(study_dir, "interrupted", failures, None, status)
        finally:
            place.close()
        found = write_results(spec, study_dir, chosen, queue.failures)
        failures = {row["folder"]: row["reason"] for row in found["failures"]}
        report = write_study_report(study_dir)
        return StudyResult(study_dir, "finished", failures, report, SOME_FAILED if failures else 0)


def _train(study: Study, queue: Queue, place: Backend, observer: Observer) -> dict[str, float]:
    """Tune, then run every arm at its rate; returns the rates."""
    spec = study.spec
    texts = study.data.fingerprint, {name: arm.tuned_on for name, arm in study.arms.items()}
    pretrain(spec, study.folder, place, observer)
    check_cells(spec, study.folder, tuning_cells(spec), *texts)
    queue.all_of(tuning_cells(spec))
    chosen = choose_rates(spec, study.folder)
    wanted = cells(spec, chosen)
    queue.failures |= untuned(spec, chosen, queue.failures)
    check_cells(spec, study.folder, wanted, *texts)
    queue.all_of(cell for cell in wanted if cell not in queue.failures)
    return chosen


def look_at(
    spec: StudySpec, study_dir: Path, configs: Mapping[str, TrainConfig], observer: Observer
) -> Study:
    """Prepare the data, which all arms share, and check every arm's claims on it."""

    def told(phase: str, fraction: float) -> None:
        observer.preparing(f"data: {phase}", fraction)

    data = prepare(next(iter(configs.values())), progress=told)
    return Study(spec, study_dir, configs, data, check_arms(spec, configs, data))


def _place(
    study: Study,
    workers: int | None,
    threads: int | None,
    backend: Callable[[int], Backend] | None,
    observer: Observer,
) -> Backend:
    count, threads = worker_shape(study.folder, study.configs, workers, threads)
    end_left_jobs(study.folder / JOBS_FOLDER, observer.message)
    if backend is not None:
        return backend(threads)
    if count * threads > _cores():
        observer.message(
            f"warning: {count} workers with {threads} threads each, as this study's first runs had, share "
            f"{_cores()} cores: its times will be longer than theirs"
        )
    return LocalWorkers(count, threads, gpus(study.configs))


def gpus(configs: Mapping[str, TrainConfig]) -> list[str]:
    """The GPUs that runs of these configurations may have, by id."""
    if not torch.cuda.is_available() or any(config.device in ("cpu", "mps") for config in configs.values()):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def worker_shape(
    study_dir: Path, configs: Mapping[str, TrainConfig], workers: int | None, threads: int | None = None
) -> tuple[int, int]:
    """How many processes, and how many threads each; the threads stay what they were at a folder's start.

    `threads` are those of runs elsewhere: what this machine has is of no account then.
    """
    available, cores = len(gpus(configs)), _cores()
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: at least 1 is needed")
    if threads is None and workers is not None and available and workers > available:
        raise ValueError(f"workers is {workers}, and there are {available} GPU(s): each worker has one")
    count = workers or available or 1
    path = study_dir / WORKERS
    if not path.is_file():
        write_json(path, {"threads": threads or max(1, cores // count)})
    return count, int(json.loads(path.read_text(encoding="utf-8"))["threads"])


def _cores() -> int:
    """Those that this process may use; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cost_words(study: Study) -> str:
    """What is about to be spent, before any of it is."""
    spec = study.spec
    wanted = (*tuning_cells(spec), *cells(spec, {}))
    total = sum(map(study.cost, wanted))
    spent = duration(total) if spec.budget_unit == "seconds" else f"{scientific(total)} FLOPs"
    return f"{spec.name}: {len(wanted)} runs, {spent} of training in all"


def write_results(
    spec: StudySpec, study_dir: Path, chosen: Mapping[str, float], failures: Mapping[Cell, str]
) -> dict[str, Any]:
    """Write results.json from the records of the runs that are there, and return its content."""
    about = read_about(study_dir)
    spec = replace(spec, preset=about["preset"])  # what study.yaml holds is the same under any name
    found = collect(spec, study_dir, about["arms"], chosen, failures, about["command"])
    write_json(study_dir / RESULTS, found)
    return found


def report_study(study_dir: str | Path) -> Path:
    """Write results.json and the report of a study anew from its records, finished or not.

    Raises
    ------
    ValueError
        If the folder holds no study, or one that never began.
    """
    study_dir = Path(study_dir)
    spec = open_study(study_dir)
    chosen = choose_rates(spec, study_dir)
    states = study_state(study_dir).cells
    failures = {state.cell: state.reason or "" for state in states if state.status == "failed"}
    write_results(spec, study_dir, chosen, failures)
    return write_study_report(study_dir)
