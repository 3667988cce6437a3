"""Weights & Biases, online or offline, as its own settings say (WANDB_MODE, WANDB_ENTITY, ...)."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ._rows import Entry, flat
from ._tracking import TrackedRun
from ._wandb_file import holds_its_end

FINISH_TIMEOUT_S = 300.0
"""So long a run that is done waits for a network that is gone; W&B's own default is for ever."""


class WeightsAndBiases:
    """Logs to the W&B run of the arm's id, with files under run_dir/wandb.

    A W&B run only takes steps that rise. Going on online, what the server has is not sent again: a step
    that is trained once more gives the same row. Offline every process writes a folder; going on, the new
    one holds the whole run and the ones before are removed, so that there is one to `wandb sync`.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._check_open(run)
        self.run: Any = wandb.init(
            project=run.project,
            group=run.group,
            name=run.name,
            id=run.id,
            job_type=run.arm,
            dir=str(run.run_dir),
            config=dict(flat(run.settings)),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, **_patience()),
        )
        self.folder = Path(self.run.dir).resolve().parent
        self.where = self.run.url or "offline"
        if self.run.offline:
            self.where = f"wandb sync {self.folder} publishes it"
            for stale in (run.run_dir / "wandb").glob(f"offline-run-*-{run.id}"):
                if self.folder != stale.resolve():
                    shutil.rmtree(stale)
        self.first_step: int = self.run.step

    @staticmethod
    def check() -> None:
        """Refuse a run that would be asked for an API key where nobody can answer."""
        import wandb
        from wandb.errors import Error

        if wandb.setup().settings.mode != "online":
            return
        try:
            wandb.login(verify=False)
        except Error as error:
            raise ValueError(
                f"report_to names wandb, and W&B has no login here ({error}): run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    @staticmethod
    def _check_open(run: TrackedRun) -> None:
        if not os.access(run.run_dir, os.W_OK):  # it would write to the system's temporary folder instead
            raise OSError(f"{str(run.run_dir)!r} cannot be written to")

    def log(self, entry: Entry) -> None:
        """Both of a step's rows make one; a growth whose step is already closed goes into the next."""
        try:
            self.run.log({**entry.values, **entry.texts}, step=max(entry.step, self.first_step))
        except OSError:
            _leave_service()
            raise

    def close(self, *, failed: bool) -> None:
        """Raises OSError if W&B did not get or keep all rows."""
        try:
            self.run.finish(exit_code=int(failed))
        except TimeoutError as error:
            raise TimeoutError(f"not all rows got through; later, `wandb sync {self.folder}`") from error
        except Exception:
            _leave_service()
            raise
        if self.run.offline and not holds_its_end(self.folder / f"run-{self.run.id}.wandb", within_s=5.0):
            raise OSError(f"{self.folder} lacks rows; was the disk full?")


def _patience() -> dict[str, Any]:
    """Settings that end the wait for a network, unless the user has set their own."""
    if "WANDB_FINISH_TIMEOUT" in os.environ:
        return {}
    return {"finish_timeout": FINISH_TIMEOUT_S, "finish_timeout_raises": True}


def _leave_service() -> None:
    """Let go of W&B's process, which is gone: the next run gets a new one, and this one ends in silence."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)
