from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiether.training import run as job
from aiether.training import samples


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Iterator[None]:
    """Of tiny runs, 120 tokens a stage take a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "NEW_TOKENS", 20)
        yield


@pytest.fixture(scope="module")
def without_report() -> Iterator[None]:
    """Runs end without drawing their reports: seconds a run where it is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "write_report", lambda directory: directory / "report.html")
        yield
