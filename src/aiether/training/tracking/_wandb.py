"""Weights & Biases, online or offline, as its own settings say (WANDB_MODE, WANDB_ENTITY, ...)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ._rows import Entry, flat
from ._tracking import TrackedRun


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
            settings=wandb.Settings(console="off", silent=True),
        )
        self.where = self.run.url or "offline"
        if self.run.offline:
            own = Path(self.run.dir).resolve()
            self.where = f"wandb sync {own.parent} publishes it"
            for stale in (run.run_dir / "wandb").glob(f"offline-run-*-{run.id}"):
                if not own.is_relative_to(stale.resolve()):
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
        self.run.log({**entry.values, **entry.texts}, step=max(entry.step, self.first_step))

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
