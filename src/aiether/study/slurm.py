"""Runs as Slurm jobs, by submitit: one job for each run."""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .cell import Outcome, is_finished
from .job import run_order
from .jobs import SAVE_S, NotedJob, cancel, note
from .pool import Order

_POLL_S = 0.5


class _Job(NamedTuple):
    order: Order
    handle: Any
    word: Path


class SubmititJobs:
    """Every run a job of submitit's executor.

    What a job says of itself is read from JSON: submitit hands results over as pickles. A job that a signal
    stopped, as at its time limit, is submitted again without a word if it saved a newer checkpoint. Jobs
    that are under way are noted in jobs.json, for `end_left_jobs`.

    Parameters
    ----------
    folder: where submitit keeps its files.
    cluster: "slurm", or "local" for processes of this machine.
    slots: jobs in the queue at a time.
    threads: of a run; a Slurm job has as many cores.
    parameters: of the executor, as `slurm_partition`, `timeout_min`, `gpus_per_node`.

    Raises
    ------
    ValueError
        If submitit is not installed, or Slurm not there.
    """

    def __init__(
        self,
        folder: Path,
        cluster: str,
        slots: int,
        threads: int,
        parameters: Mapping[str, Any],
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise ValueError("backend slurm needs submitit: pip install 'aiether[slurm]'") from None
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        except RuntimeError as error:
            raise ValueError(f"backend slurm: {error}; run it where Slurm's commands are") from None
        once = {"slurm_additional_parameters": {"no-requeue": True}}  # whether again, the study decides
        self._executor.update_parameters(cpus_per_task=threads, **once, **parameters)
        self.slots, self._threads = slots, threads
        self._folder, self._cluster = folder, cluster
        self._jobs: dict[Path, _Job] = {}
        self._stopping = False

    def submit(self, order: Order) -> None:
        """Queue a run.

        Raises
        ------
        ValueError
            If Slurm does not take the job.
        """
        word = self._folder / f"{uuid.uuid4().hex}.json"
        given = (str(order.folder), dict(order.settings), order.keep_models, self._threads, str(word))
        try:
            with _without_ctrl_c():
                job = self._executor.submit(run_order, *given)
                self._jobs[order.folder] = _Job(order, job, word)
                self._note()
        except RuntimeError as error:
            raise ValueError(
                f"no job was taken: {error}; other --slurm_* flags or fewer --workers may help"
            ) from None

    def wait(self, timeout_s: float) -> list[tuple[Order, Outcome]]:
        """The runs that have ended since."""
        deadline = time.monotonic() + timeout_s
        while not (ended := self._ended()) and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left))
        return ended

    def _ended(self) -> list[tuple[Order, Outcome]]:
        ended = []
        for job in [each for each in self._jobs.values() if each.handle.done()]:
            del self._jobs[job.order.folder]
            self._note()
            outcome, further = _outcome(job)
            if outcome.status == "interrupted" and further and not self._stopping:
                self.submit(job.order)
            else:
                ended.append((job.order, outcome))
        return ended

    def _note(self) -> None:
        note(self._folder, map(self._noted, self._jobs.values()))

    def _noted(self, job: _Job) -> NotedJob:
        return NotedJob(str(job.order.folder), self._cluster, job.handle.job_id)

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        """Cancel the jobs: each gets a signal first, and time to save."""
        self._stopping = True
        self._cancel()
        deadline = time.monotonic() + SAVE_S
        while self._jobs and (left := deadline - time.monotonic()) > 0:
            yield from self.wait(left)

    def close(self) -> None:
        """Cancel what is left; the next call waits for it."""
        self._cancel()
        self._jobs.clear()

    def _cancel(self) -> None:
        cancel(self._noted(job) for job in self._jobs.values() if not job.handle.done())


def _outcome(job: _Job) -> tuple[Outcome, bool]:
    """How a job ended, and whether it got further."""
    log = f"{job.order.folder}.log"
    if not job.word.is_file():
        if is_finished(job.order.folder):
            return Outcome("finished"), True
        reason = (
            f"job {job.handle.job_id} ended as {job.handle.state}; its logs: {job.handle.paths.stderr}, {log}"
        )
        return Outcome("failed", reason), False
    said = json.loads(job.word.read_text(encoding="utf-8"))
    match said["status"]:
        case "finished":
            return Outcome("finished"), True
        case "interrupted":
            reason = f"job {job.handle.job_id} was stopped and had got no further; its log: {log}"
            return Outcome("interrupted", reason), said["further"]
        case _:
            return Outcome("failed", f"{said['reason']}; its log: {log}"), said["further"]


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """What is started here hears no Ctrl-C: that is for the runner, once this is over; it has runs save."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
