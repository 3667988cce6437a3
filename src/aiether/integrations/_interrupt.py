"""Ctrl-C and SIGTERM: while a model trains they end the run with everything saved, elsewhere at once.

A second signal ends a run at once, and a third one kills it. The exit status of a run that a signal ended is
the shell's: 128 + the signal's number (130 for Ctrl-C, 143 for SIGTERM).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at once."""

    def __init__(self, signal_name: str, message: str | None = None) -> None:
        self.signal_name = signal_name
        super().__init__(message or f"interrupted by {signal_name}")

    @property
    def exit_status(self) -> int:
        return interrupted_status(self.signal_name)


def interrupted_status(signal_name: str) -> int:
    """The exit status of a process that this signal ended."""
    return 128 + signal.Signals[signal_name].value


class InterruptFlag:
    """Set by the first signal; a second one raises `Interrupted` at once, a third has the system's effect."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self:
            _raise_once(number, frame)
        self.signal_name = name


@contextmanager
def catch_interrupts() -> Iterator[InterruptFlag]:
    """Catch SIGINT and SIGTERM into a flag; elsewhere than in the main thread, signals stay as they are."""
    flag = InterruptFlag()
    with _handled_by(flag.handle):
        yield flag


@contextmanager
def raise_interrupts() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted`, so that what is half done is cleaned up on the way out."""
    with _handled_by(_raise_once):
        yield


def _raise_once(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # should the way out hang
    raise Interrupted(signal.Signals(number).name)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
