"""Carry a study out: what is missing is run, what failed is tried once more, what is there is kept."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml

from aiether.data import PackedData, prepare
from aiether.integrations import hold, raise_interrupts, write_json
from aiether.training._format import duration, scientific
from aiether.training.config import TrainConfig

from .arms import Cell, cell_config, cells, tuning_cells
from .cell import Outcome, is_finished
from .check import Arm, check_arms, check_spec, planned_flops
from .pool import Backend, LocalWorkers, Order
from .report import write_study_report
from .results import choose_rates, collect, spec_hash
from .spec import StudySpec, plain, read_spec
from .state import ABOUT, ATTEMPTS, MAX_ATTEMPTS, RESULTS, SPEC, WORKERS, open_study, study_state

_POLL_S = 1.0


class Observer(Protocol):
    """Who is told how a study goes on."""

    def message(self, text: str) -> None: ...
    def begin(self, total: Sequence[Cell], done: Sequence[Cell], cost: Callable[[Cell], float]) -> None: ...
    def started(self, cell: Cell) -> None: ...
    def ended(self, cell: Cell, outcome: Outcome, metric: float | None, seconds: float) -> None: ...
    def preparing(self, phase: str, fraction: float) -> None: ...
    def tick(self) -> None: ...


@dataclass(frozen=True)
class StudyResult:
    """How a study ended, and where what it found lies. `failures`: run folders without a result, and why."""

    study_dir: Path
    status: Literal["finished", "interrupted"]
    failures: Mapping[str, str]
    report: Path | None
    exit_status: int


@dataclass(frozen=True)
class Study:
    """A study that has been looked at: its folder, its arms and what each of them costs."""

    spec: StudySpec
    folder: Path
    configs: Mapping[str, TrainConfig]
    data: Mapping[str, PackedData]
    arms: Mapping[str, Arm]


def run_study(
    spec: StudySpec,
    study_dir: Path,
    observer: Observer,
    *,
    workers: int | None = None,
    backend: Callable[[int], Backend] | None = None,
    command: str | None = None,
) -> StudyResult:
    """Run what is missing of a study in `study_dir`, then write results.json and the report.

    Parameters
    ----------
    workers: processes at a time; None: one for each GPU, or one on a processor. A folder keeps the number
        of threads that its first runs had, since sums depend on it.
    backend: makes the place where runs are done from the threads of a run; None: processes of this machine.
    command: what a reader types to run it again.

    Raises
    ------
    ValueError
        For a specification, data or a folder that cannot work, before anything runs.
    """
    configs = check_spec(spec)
    with hold(study_dir), raise_interrupts():
        check_folder(spec, study_dir)
        study = look_at(spec, study_dir, configs, observer)
        write_spec(spec, study_dir)
        command = command or f"aiether study run {shlex.quote(str(study_dir / SPEC))}"
        facts = {name: arm.facts() for name, arm in study.arms.items()}
        write_json(study_dir / ABOUT, {"command": command, "preset": spec.preset, "arms": facts})
        count, threads = worker_shape(study_dir, configs, workers)
        place = backend(threads) if backend else LocalWorkers(count, threads, gpus(configs))
        observer.message(_cost_words(study))
        runs = _Runs(study, place, observer)
        try:
            if not runs.all_of(tuning_cells(spec)):
                return runs.interrupted()
            chosen = choose_rates(spec, study_dir)
            wanted = cells(spec, chosen)
            if spec.tuning is not None:
                untuned = [cell for cell in wanted if cell.condition not in chosen]
                runs.failures |= dict.fromkeys(untuned, "no learning rate: all runs of its tuning failed")
            if not runs.all_of(cell for cell in wanted if cell not in runs.failures):
                return runs.interrupted()
        finally:
            place.close()
        found = write_results(spec, study_dir, chosen, runs.failures)
        failures = {row["folder"]: row["reason"] for row in found["failures"]}
        report = write_study_report(study_dir)
        return StudyResult(study_dir, "finished", failures, report, 3 if failures else 0)


def look_at(
    spec: StudySpec, study_dir: Path, configs: Mapping[str, TrainConfig], observer: Observer
) -> Study:
    """Prepare the data and check every arm's claims on it."""
    prepared: dict[tuple[Any, ...], PackedData] = {}
    data = {}
    for name, config in configs.items():
        key = (config.tokenizer, config.vocab_size)
        if key not in prepared:
            prepared[key] = prepare(config, progress=observer.preparing)
        data[name] = prepared[key]
    return Study(spec, study_dir, configs, data, check_arms(spec, configs, data))


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
    others = sorted(entry.name for entry in study_dir.iterdir() if entry.name != "run.lock")
    if others:
        raise ValueError(
            f"output_dir {str(study_dir)!r} holds {others[0]} and no study; name a new or an empty folder"
        )


def write_spec(spec: StudySpec, study_dir: Path) -> None:
    """Write study.yaml where there is none."""
    path = study_dir / SPEC
    if path.is_file():
        return
    content = json.loads(json.dumps(plain(spec)))  # nothing in it is the same object: YAML would name it once
    temporary = path.with_name(f".{SPEC}.tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    temporary.replace(path)


def gpus(configs: Mapping[str, TrainConfig]) -> list[str]:
    """The GPUs that runs of these configurations may have, by id."""
    if not torch.cuda.is_available() or any(config.device in ("cpu", "mps") for config in configs.values()):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def worker_shape(study_dir: Path, configs: Mapping[str, TrainConfig], workers: int | None) -> tuple[int, int]:
    """How many processes, and how many threads each; the threads stay what they were at a folder's start."""
    available, cores = len(gpus(configs)), len(os.sched_getaffinity(0))
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: at least 1 is needed")
    if workers is not None and available and workers > available:
        raise ValueError(f"workers is {workers}, and there are {available} GPU(s): each worker has one")
    count = workers or available or 1
    path = study_dir / WORKERS
    if not path.is_file():
        write_json(path, {"threads": max(1, cores // count)})
    return count, int(json.loads(path.read_text(encoding="utf-8"))["threads"])


def _cost_words(study: Study) -> str:
    """What is about to be spent, before any of it is."""
    spec = study.spec
    wanted = (*tuning_cells(spec), *cells(spec, {}))
    if spec.budget_unit == "seconds":
        seconds = sum(spec.budget * cell.length for cell in wanted)
        return f"{spec.name}: {len(wanted)} runs, {duration(seconds)} of training in all"
    flops = sum(planned_flops(spec, study.arms, cell) or 0.0 for cell in wanted)
    return f"{spec.name}: {len(wanted)} runs, {scientific(flops)} FLOPs of training in all"


class _Runs:
    """The queue of runs, with what has failed so far."""

    def __init__(self, study: Study, place: Backend, observer: Observer) -> None:
        self._study, self._place, self._observer = study, place, observer
        self.failures: dict[Cell, str] = {}
        self._attempts: dict[Cell, int] = {}
        self._running: dict[Path, tuple[Cell, float]] = {}

    def all_of(self, wanted: Iterable[Cell]) -> bool:
        """Run the cells that are not there yet; False if a signal came in between (all runs are saved)."""
        wanted = list(wanted)
        done = [cell for cell in wanted if is_finished(self._folder(cell))]
        self._observer.begin(wanted, done, self._cost)
        waiting = deque(cell for cell in wanted if cell not in done)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._place.slots:
                    self._submit(waiting.popleft())
                for order, outcome in self._place.wait(_POLL_S):
                    self._take(order, outcome, waiting)
                self._observer.tick()
        except KeyboardInterrupt:
            self._observer.message("stopping: every run saves first")
            for order, _ in self._place.interrupt():
                self._running.pop(order.folder)
            return False
        return True

    def interrupted(self) -> StudyResult:
        """The result of a study that a signal stopped."""
        failures = {cell.folder: reason for cell, reason in self.failures.items()}
        return StudyResult(self._study.folder, "interrupted", failures, None, 130)

    def _folder(self, cell: Cell) -> Path:
        return self._study.folder / cell.folder

    def _cost(self, cell: Cell) -> float:
        """FLOPs, or seconds where these are the budget: what the time left is reckoned by."""
        flops = planned_flops(self._study.spec, self._study.arms, cell)
        return self._study.spec.budget * cell.length if flops is None else flops

    def _submit(self, cell: Cell) -> None:
        settings = asdict(cell_config(self._study.spec, cell))
        folder = self._folder(cell)
        self._attempts[cell] = self._attempts.get(cell, 0) + 1
        self._running[folder] = cell, time.monotonic()
        self._place.submit(Order(folder, settings, self._study.spec.keep_models))
        self._observer.started(cell)

    def _take(self, order: Order, outcome: Outcome, waiting: deque[Cell]) -> None:
        cell, began = self._running.pop(order.folder)
        metric = _metric(order.folder, self._study.spec.metric)
        self._observer.ended(cell, outcome, metric, time.monotonic() - began)
        if outcome.status == "finished":
            return
        reason = outcome.reason or "it was interrupted"
        self._note_attempt(cell, reason)
        if self._attempts[cell] < MAX_ATTEMPTS:
            waiting.append(cell)
        else:
            self.failures[cell] = reason

    def _note_attempt(self, cell: Cell, reason: str) -> None:
        row = {"folder": cell.folder, "attempt": self._attempts[cell], "reason": reason}
        with (self._study.folder / ATTEMPTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _metric(folder: Path, name: str) -> float | None:
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8"))[name] if path.is_file() else None


def write_results(
    spec: StudySpec, study_dir: Path, chosen: Mapping[str, float], failures: Mapping[Cell, str]
) -> dict[str, Any]:
    """Write results.json from the records of the runs that are there, and return its content."""
    about = json.loads((study_dir / ABOUT).read_text(encoding="utf-8"))
    spec = replace(spec, preset=about["preset"])  # what study.yaml holds is the same under any name
    found = collect(spec, study_dir, about["arms"], chosen, failures, about["command"])
    write_json(study_dir / RESULTS, found)
    return found


def report_study(study_dir: Path) -> Path:
    """Write results.json and the report of a study anew from its records, finished or not.

    Raises
    ------
    ValueError
        If the folder holds no study, or one that never began.
    """
    spec = open_study(study_dir)
    if not (study_dir / ABOUT).is_file():
        raise ValueError(f"the study in {str(study_dir)!r} has not begun; aiether study run {study_dir}")
    chosen = choose_rates(spec, study_dir)
    states = study_state(study_dir).cells
    failures = {state.cell: state.reason or "" for state in states if state.status == "failed"}
    write_results(spec, study_dir, chosen, failures)
    return write_study_report(study_dir)
