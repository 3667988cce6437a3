"""The watcher between a run and its trackers: opens, replays, passes on, and never stops the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from aiether.integrations import Row

from ._rows import Entry, entry_of, history


@dataclass(frozen=True)
class TrackedRun:
    """One arm of a run as trackers know it.

    Attributes:
        id: the same in every process that goes on with the arm, and no other run's.
        project, group, name: the arm is the run `name`; what was started together shares `group`.
        arm: `grown` or `static`.
        run_dir, arm_dir: where the run and this arm keep their files.
        settings: configuration and environment, shown as hyperparameters.
    """

    id: str
    project: str
    group: str
    name: str
    arm: str
    run_dir: Path
    arm_dir: Path
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """What each library is reduced to.

    `first_step`: entries before it are with the tracker already. `where`: how a user gets to see the run.
    """

    first_step: int
    where: str

    def log(self, entry: Entry) -> None: ...

    def close(self, *, failed: bool) -> None: ...


OpenTracker = Callable[[TrackedRun], Tracker]


class Tracking:
    """Passes an arm's rows on to its trackers. Use it as a context, and `observe` as what rows are told to.

    Trackers open at the first stage, when the records stand at the checkpoint that the arm goes on from.
    They are then given all of those records, so that nothing is missing or double, whatever of it had
    reached them when the process before this one ended. A tracker that fails is left with one warning.
    """

    def __init__(
        self, run: TrackedRun, openers: Mapping[str, OpenTracker], say: Callable[[str], None]
    ) -> None:
        self.run, self.openers, self.say = run, openers, say
        self.trackers: dict[str, Tracker] = {}
        self.opened = False

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=error is not None)

    def observe(self, kind: str, row: Row) -> None:
        if kind == "stage":
            self._open()
        elif kind == "resume" and self.opened:  # in mid-run: the records went back to a checkpoint
            self.openers = {name: self.openers[name] for name in self.trackers}
            self._close(failed=False)
        elif self.trackers and (entry := entry_of(kind, row)):
            for name, tracker in list(self.trackers.items()):
                self._try(name, tracker.log, entry)

    def _close(self, *, failed: bool) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.close, failed=failed))
        self.trackers.clear()
        self.opened = False

    def _open(self) -> None:
        if self.opened:
            return
        self.opened = True
        for name, opener in self.openers.items():
            self._try(name, self._open_one, name, opener)

    def _open_one(self, name: str, opener: OpenTracker) -> None:
        past = history(self.run.arm_dir)
        tracker = self.trackers[name] = opener(self.run)
        for entry in past:
            if entry.step >= tracker.first_step:
                tracker.log(entry)
        self.say(f"tracking with {name}: {tracker.where}")

    def _try(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever a library raises, a run must not die of its chart
            self.trackers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(
                f"warning: tracking with {name} has stopped ({reason}); training goes on, and "
                f"{self.run.arm_dir / 'metrics.jsonl'} has every row"
            )
