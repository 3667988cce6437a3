"""The runs of a study, one after the other to where they are done; what fails is tried once more."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from aiether.data import PackedData
from aiether.training.config import TrainConfig

from .arms import Cell, cell_config, retrofit_of
from .cell import Outcome, base_of, drop_weights, is_finished
from .check import Arm, planned_flops
from .pool import Backend, Order
from .spec import StudySpec
from .state import ATTEMPTS, MAX_ATTEMPTS, append_row

_POLL_S = 1.0


class Observer(Protocol):
    """Who is told how a study goes on."""

    def message(self, text: str) -> None: ...
    def begin(self, total: Sequence[Cell], done: Sequence[Cell], cost: Callable[[Cell], float]) -> None: ...
    def ended(self, cell: Cell, outcome: Outcome, metric: float | None, seconds: float) -> None: ...
    def preparing(self, phase: str, fraction: float) -> None: ...
    def tick(self) -> None: ...


class Nobody:
    """An observer that says nothing."""

    def message(self, text: str) -> None: ...
    def begin(self, total: Sequence[Cell], done: Sequence[Cell], cost: Callable[[Cell], float]) -> None: ...
    def ended(self, cell: Cell, outcome: Outcome, metric: float | None, seconds: float) -> None: ...
    def preparing(self, phase: str, fraction: float) -> None: ...
    def tick(self) -> None: ...


@dataclass(frozen=True)
class Study:
    """A study that has been looked at: its folder, its arms and what each of them costs."""

    spec: StudySpec
    folder: Path
    configs: Mapping[str, TrainConfig]
    data: PackedData
    arms: Mapping[str, Arm]

    def cost(self, cell: Cell) -> float:
        """FLOPs of a run, or seconds where these are the budget."""
        flops = planned_flops(self.spec, self.arms, cell)
        return self.spec.budget * cell.length if flops is None else flops


class Queue:
    """Gives runs to a backend; `failures` are those that failed for good, and why."""

    def __init__(self, study: Study, place: Backend, observer: Observer) -> None:
        self._study, self._place, self._observer = study, place, observer
        self.failures: dict[Cell, str] = {}
        self._attempts: dict[Cell, int] = {}
        self._running: dict[Path, tuple[Cell, float]] = {}

    def all_of(self, wanted: Iterable[Cell]) -> None:
        """Run the cells that are not there yet.

        Raises
        ------
        KeyboardInterrupt
            For a signal, after every run has saved.
        """
        wanted = list(wanted)
        done = {cell for cell in wanted if is_finished(self._folder(cell))}
        for cell in done:
            drop_weights(self._folder(cell), self._study.spec.keep_models)  # a kill may have come before that
        self._observer.begin(wanted, [cell for cell in wanted if cell in done], self._study.cost)
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
                self._running.pop(order.folder, None)
            raise

    def _folder(self, cell: Cell) -> Path:
        return self._study.folder / cell.folder

    def _submit(self, cell: Cell) -> None:
        settings = asdict(cell_config(self._study.spec, cell))
        given = retrofit_of(self._study.spec, cell.condition)
        if given is not None:
            settings |= {"retrofit": given, "retrofit_base": str(base_of(self._study.folder))}
        folder = self._folder(cell)
        self._attempts[cell] = self._attempts.get(cell, 0) + 1
        self._running[folder] = cell, time.monotonic()
        self._place.submit(Order(folder, settings, self._study.spec.keep_models))

    def _take(self, order: Order, outcome: Outcome, waiting: deque[Cell]) -> None:
        cell, began = self._running.pop(order.folder)
        if is_finished(order.folder):  # whatever became of its process after that
            outcome = Outcome("finished")
        metric = _metric(order.folder, self._study.spec.metric)
        self._observer.ended(cell, outcome, metric, time.monotonic() - began)
        if outcome.status == "finished":
            return
        reason = outcome.reason or "it was interrupted"
        row = {"folder": cell.folder, "attempt": self._attempts[cell], "reason": reason}
        append_row(self._study.folder / ATTEMPTS, row)
        if self._attempts[cell] < MAX_ATTEMPTS:
            waiting.append(cell)
        else:
            self.failures[cell] = reason


def _metric(folder: Path, name: str) -> float | None:
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8"))[name] if path.is_file() else None
