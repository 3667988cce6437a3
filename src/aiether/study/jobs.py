"""Jobs that are under way, noted in a file: those of a runner that was killed are ended by the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from aiether.integrations import hold, write_json

FOLDER, JOBS = "slurm", "jobs.json"
SAVE_S = 120.0
"""How long jobs that are told to stop may take to save."""
_POLL_S = 0.5


class NotedJob(NamedTuple):
    """A job: the run folder it works on, "slurm" or "local", and its id there."""

    run: str
    cluster: str
    job_id: str


def note(folder: Path, jobs: Iterable[NotedJob]) -> None:
    """Write down what is under way; `folder` is where submitit keeps its files."""
    write_json(folder / JOBS, {os.path.abspath(job.run): [job.cluster, job.job_id] for job in jobs})


def end_left_jobs(folder: Path, say: Callable[[str], None]) -> None:
    """Cancel the jobs of a runner that was killed, and wait until their run folders are free.

    Raises
    ------
    ValueError
        If a job does not end, or Slurm's commands are not here.
    """
    record = folder / JOBS
    noted = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if not noted:
        return
    left = [NotedJob(run, *job) for run, job in noted.items()]
    say(f"ending {len(left)} job(s) of an earlier call, if they are still there: each run saves first")
    cancel(job for job in left if job.cluster == "slurm" or _is_controller(job.job_id, folder))
    deadline = time.monotonic() + SAVE_S
    while busy := [job for job in left if not _is_free(job, folder)]:
        if time.monotonic() > deadline:
            raise ValueError(
                f"job {busy[0].job_id} still works on {busy[0].run}: end it, then run this again"
            )
        time.sleep(_POLL_S)
    record.unlink()


def cancel(jobs: Iterable[NotedJob]) -> None:
    """Have jobs save and stop: by SIGTERM, as submitit itself would give its local ones a second for that."""
    slurm = []
    for job in jobs:
        if job.cluster == "slurm":
            slurm.append(job.job_id)
            continue
        with suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)
    try:
        if slurm:  # what it says of jobs that have ended is of no interest
            subprocess.run(["scancel", *slurm], check=False, capture_output=True)
    except FileNotFoundError:
        raise ValueError(
            f"Slurm's scancel is not here, to end {', '.join(slurm)}: go on where it is"
        ) from None


def _is_free(job: NotedJob, folder: Path) -> bool:
    if job.cluster == "local" and _is_controller(job.job_id, folder):
        return False
    if not Path(job.run).is_dir():
        return True
    try:
        with hold(Path(job.run)):
            return True
    except ValueError:
        return False


def _is_controller(pid: str, folder: Path) -> bool:
    """Whether a process is submitit's, at work for this folder: ids are used again."""
    try:
        words = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "submitit.local._local" in words and os.path.abspath(folder) in words
