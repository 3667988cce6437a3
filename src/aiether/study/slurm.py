"""Runs as Slurm jobs, by submitit: one job for each run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .cell import Outcome, is_finished, run_cell
from .pool import Order

_POLL_S = 0.5
_SAVE_S = 120.0


def run_order(folder: str, settings: Mapping[str, Any], keep_models: bool) -> str | None:
    """What a job does; returns why the run failed."""
    return run_cell(Path(folder), settings, keep_models=keep_models).reason


class SubmititJobs:
    """Every run a job of submitit's executor.

    What a job says of itself is read from the run's own folder: submitit hands results over as pickles.

    Parameters
    ----------
    folder: where submitit keeps its files.
    cluster: "slurm", or "local" for processes of this machine.
    slots: jobs in the queue at a time.
    parameters: of the executor, as `slurm_partition`, `timeout_min`, `gpus_per_node`, `cpus_per_task`.

    Raises ValueError if submitit is not installed.
    """

    def __init__(self, folder: Path, cluster: str, slots: int, parameters: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise ValueError("backend slurm needs submitit: pip install 'aiether[slurm]'") from None
        self.slots = slots
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self._executor.update_parameters(**parameters)
        self._jobs: dict[Path, tuple[Order, Any]] = {}

    def submit(self, order: Order) -> None:
        """Queue a run."""
        job = self._executor.submit(run_order, str(order.folder), dict(order.settings), order.keep_models)
        self._jobs[order.folder] = order, job

    def wait(self, timeout_s: float) -> list[tuple[Order, Outcome]]:
        """The runs that have ended since."""
        deadline = time.monotonic() + timeout_s
        while not (ended := self._ended()) and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left))
        return ended

    def _ended(self) -> list[tuple[Order, Outcome]]:
        done = [(order, job) for order, job in self._jobs.values() if job.done()]
        for order, _ in done:
            del self._jobs[order.folder]
        return [(order, _outcome(order, job)) for order, job in done]

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        """Cancel the jobs: each gets a signal first, and time to save."""
        for _, job in self._jobs.values():
            job.cancel(check=False)
        deadline = time.monotonic() + _SAVE_S
        while self._jobs and (left := deadline - time.monotonic()) > 0:
            yield from self.wait(left)

    def close(self) -> None:
        """Cancel what is left."""
        for _, job in self._jobs.values():
            job.cancel(check=False)
        self._jobs.clear()


def _outcome(order: Order, job: Any) -> Outcome:
    if is_finished(order.folder):
        return Outcome("finished")
    return Outcome("failed", f"job {job.job_id} ended as {job.state}; its log: {job.paths.stderr}")
