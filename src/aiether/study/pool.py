"""Local worker processes: each has a GPU, or its share of the processor, to itself."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from .cell import Outcome

_SAVE_S = 60.0
"""How long a run that is told to stop may take to save."""


@dataclass(frozen=True)
class Order:
    """A run to be done: its folder, its settings, and whether its weights stay."""

    folder: Path
    settings: Mapping[str, Any]
    keep_models: bool

    def line(self) -> str:
        """As a worker reads it."""
        content = {"folder": str(self.folder), "settings": self.settings, "keep_models": self.keep_models}
        return json.dumps(content) + "\n"


class Backend(Protocol):
    """Where runs are done."""

    slots: int

    def submit(self, order: Order) -> None:
        """Begin a run; there is a free slot."""
        ...

    def wait(self, timeout_s: float) -> Sequence[tuple[Order, Outcome]]:
        """The runs that have ended, after at most `timeout_s`."""
        ...

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        """Have every run save and stop; yields how each ended."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class LocalWorkers:
    """As many processes as workers, each started when it is first needed and again when it has died.

    Parameters
    ----------
    workers: processes at a time.
    threads: of the processor, for each worker.
    gpus: ids of the GPUs to use, one for each worker in turn; empty on a processor.
    """

    def __init__(self, workers: int, threads: int, gpus: Sequence[str] = ()) -> None:
        self.slots, self._threads, self._gpus = workers, threads, list(gpus)
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._orders: dict[int, Order] = {}

    @property
    def processes(self) -> tuple[subprocess.Popen[str], ...]:
        """The workers that were started and have not been seen to end."""
        return tuple(self._processes.values())

    def submit(self, order: Order) -> None:
        slot = next(slot for slot in range(self.slots) if slot not in self._orders)
        process = self._processes.get(slot)
        if process is None or process.poll() is not None:
            process = self._processes[slot] = self._start(slot)
        self._orders[slot] = order
        with suppress(BrokenPipeError):  # it died since; `wait` finds that, and says so
            _input(process).write(order.line())
            _input(process).flush()

    def _start(self, slot: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return subprocess.Popen(
            [sys.executable, "-m", "aiether.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the runner, which has its workers save
        )

    def wait(self, timeout_s: float) -> list[tuple[Order, Outcome]]:
        with selectors.DefaultSelector() as selector:
            for slot in self._orders:
                selector.register(_output(self._processes[slot]), selectors.EVENT_READ, slot)
            ready = [key.data for key, _ in selector.select(timeout_s)]
        return [(self._orders.pop(slot), self._ended(slot)) for slot in ready]

    def _ended(self, slot: int) -> Outcome:
        outcome = self._answer(slot)
        if outcome.status == "failed" and (process := self._processes.pop(slot, None)) is not None:
            _end(process)  # a GPU or memory that a fault has spoilt would fail the next runs too
        return outcome

    def _answer(self, slot: int) -> Outcome:
        line = _output(self._processes[slot]).readline()
        if line.endswith("\n"):
            return Outcome(**json.loads(line))
        status = self._processes.pop(slot).wait()
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Outcome("failed", f"its process ended with {cause}")

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        for slot in self._orders:
            self._processes[slot].send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _SAVE_S
        while self._orders and (left := deadline - time.monotonic()) > 0:
            yield from self.wait(left)

    def close(self) -> None:
        for process in self._processes.values():
            _end(process)
        self._processes.clear()
        self._orders.clear()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def _input(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdin is not None
    return process.stdin


def _output(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout
