"""How far a long job over files is: a bar with speed and time left, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PLAIN_INTERVAL_S = 10.0


@contextmanager
def bytes_progress(title: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Gives a callable that is told how many bytes are done, of how many; everything goes to stderr."""
    console = console or Console(file=sys.stderr)
    if not console.is_terminal:
        yield _plain(title, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _plain(title: str, console: Console, before: int = 0) -> Callable[[int, int], None]:
    """`before` was done already, by an earlier call: it says nothing of the time that the rest takes."""
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL_S or done <= before:
            return
        last = now
        left = (now - started) * (total - done) / (done - before)
        console.print(f"{title}: {100 * done / total:.0f} %, about {left:.0f} s left", highlight=False)

    return report


@contextmanager
def phase_progress(console: Console | None = None) -> Iterator[Callable[[str, float], None]]:
    """Gives a callable that is told what is done and the share of it so far; everything goes to stderr."""
    console = console or Console(file=sys.stderr)
    if not console.is_terminal:
        yield _plain_phases(console)
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, fraction: float) -> None:
            if phase not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[phase] = progress.add_task(phase, total=1.0, completed=fraction)  # type: ignore[arg-type]
            progress.update(tasks[phase], completed=fraction)

        yield report


def _plain_phases(console: Console) -> Callable[[str, float], None]:
    reports: dict[str, Callable[[int, int], None]] = {}

    def report(phase: str, fraction: float) -> None:
        if phase not in reports:
            reports[phase] = _plain(phase, console, round(fraction * 1000))
        reports[phase](round(fraction * 1000), 1000)

    return report
