"""trackio: a local database (TRACKIO_DIR, else its own default), looked at with `trackio show`."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from ._rows import Entry, flat
from ._tracking import TrackedRun

_ID = "aiether_run_id"
_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio:
    """Logs to a trackio run. Going on, the run's rows are deleted and written again from the records.

    It knows its run by an id among the settings: names are the user's, and two runs may share one.
    """

    first_step = 0

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.where = f"trackio show --project {run.project}"
        self.project, self.rows = run.project, 0
        for old in _runs(run.project):
            if old.name == run.name and (old.config or {}).get(_ID) == run.id:
                old.delete()
        with contextlib.redirect_stdout(io.StringIO()):  # it greets and says good-bye
            self.run: Any = trackio.init(
                project=run.project,
                name=run.name,
                group=run.group,
                config={**flat(run.settings), _ID: run.id},
                embed=False,
            )

    @staticmethod
    def check() -> None:
        """Refuse a remote trackio: rows there could not be taken back when a run goes on."""
        for name in _REMOTE:
            if os.environ.get(name):
                raise ValueError(
                    f"report_to names trackio and {name} is set: aiether logs to the local trackio only; "
                    "unset it, and publish the project afterwards with `trackio sync`"
                )

    def log(self, entry: Entry) -> None:
        self.run.log({**entry.values, **entry.texts}, step=entry.step)
        self.rows += 1

    def close(self, *, failed: bool) -> None:
        """Raises OSError if trackio did not keep all rows: it writes them later, and only warns."""
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # the current run is ours: one is open at a time
        kept = SQLiteStorage.get_log_count(self.project, run_id=self.run.id)
        if kept < self.rows:
            raise OSError(f"it holds {kept} of {self.rows} rows")


def _runs(project: str) -> list[Any]:
    """What is filed under a project; nothing if it does not exist yet."""
    import trackio

    try:
        return list(trackio.Api().runs(project))
    except ValueError:
        return []
