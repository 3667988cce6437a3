"""How a study goes on: a line for each run and, on a terminal, a bar with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from aiether.study.arms import Cell
from aiether.study.cell import Outcome
from aiether.training._format import duration

_LINE_S = 60.0
"""Between two lines on how far a phase is, where there is no terminal."""


class _Pace:
    """How long the rest of a phase takes, by when shares of it were seen to be reached.

    The first one counts for nothing: it may be an earlier call's work, and what began then was no work yet.
    """

    def __init__(self) -> None:
        self._share: float | None = None
        self._first = self._last = (0.0, 0.0)

    def see(self, share: float, now: float) -> None:
        if self._share is not None and share != self._share:
            self._last = now, share
            if self._first == (0.0, 0.0) or share < self._share:
                self._first = self._last
        self._share = share

    def left(self, now: float) -> float | None:
        """Seconds; None until two shares were reached."""
        (began, first), (reached, last) = self._first, self._last
        if last <= first:
            return None
        return max(0.0, (reached - began) * (1 - last) / (last - first) - (now - reached))


class StudyDisplay:
    """Prints to `console`; where that is a terminal, with a live bar below.

    The time left is that of the runs which ended in this session, by what they cost; what was there before
    tells nothing of this machine's speed now.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console or Console(), clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase, self._pace, self._told = "", _Pace(), 0.0

    def message(self, text: str) -> None:
        """One line."""
        console = self._progress.console if self._progress else self.console
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def preparing(self, phase: str, fraction: float) -> None:
        """Work before the runs, and the share of it that is done: a bar, or a line now and then."""
        now = self._clock()
        if phase != self._phase:
            self.close()
            self._phase, self._pace, self._told = phase, _Pace(), now
            self.message(phase)
            if self.console.is_terminal:
                self._start_bar(1.0)
        self._pace.see(fraction, now)
        left = self._pace.left(now)
        words = "" if left is None else f"about {duration(left)} left"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=fraction, description=f"{fraction:.0%}", left=words)
        elif words and now - self._told >= _LINE_S:
            self._told = now
            self.message(f"{phase}: {100 * fraction:.0f} %, {words}")
        if fraction >= 1:
            self.close()

    def begin(self, total: Sequence[Cell], done: Sequence[Cell], cost: Callable[[Cell], float]) -> None:
        """A set of runs, of which some are there already."""
        self.close()
        self._cost, self._total = cost, len(total)
        self._ended = len(done)
        self._left = sum(map(cost, total)) - sum(map(cost, done))
        self._all = self._left
        self._spent, self._began = 0.0, self._clock()
        if total:
            there = f", {len(done)} of them there already" if done else ""
            self.message(f"{'tuning' if total[0].tuning else 'study'}: {len(total)} runs{there}")
        if self.console.is_terminal and self._left:
            self._start_bar(self._all)
            self.tick()

    def _start_bar(self, total: float) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._progress.start()
        self._task = self._progress.add_task("", total=total, left="")

    def ended(self, cell: Cell, outcome: Outcome, metric: float | None, seconds: float) -> None:
        """A run ended, well or not."""
        if outcome.status == "finished":
            self._ended += 1
            self._spent += self._cost(cell)
            figure = "" if metric is None else f": {metric:.4f}"
            line = f"[{self._ended}/{self._total}] {words(cell)}{figure} in {duration(seconds)}"
            left = self.time_left()
            self.message(line + (f"; about {duration(left)} left" if left else ""))
        else:
            self.message(f"{words(cell)} {outcome.status}: {outcome.reason or 'by a signal'}")
        self.tick()

    def time_left(self) -> float | None:
        """Seconds, from the runs that ended in this session; None before the first."""
        if not self._spent:
            return None
        return (self._left - self._spent) * (self._clock() - self._began) / self._spent

    def tick(self) -> None:
        """Redraw the bar."""
        if self._progress is not None and self._task is not None:
            left = self.time_left()
            text = "" if left is None else f"about {duration(left)} left"
            name = f"{self._ended}/{self._total} runs"
            self._progress.update(self._task, completed=self._spent, description=name, left=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def words(cell: Cell) -> str:
    """A run as it is called on the terminal."""
    length = "" if cell.length == 1.0 else f" x{cell.length:g}"
    rate = "" if cell.lr is None else f" lr {cell.lr:g}"
    return f"{cell.condition}{length}{rate} seed {cell.seed}"
