"""Runs as jobs of submitit, by its executor for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.study.test_workers import carry_out, content

from aiether.study.slurm import SubmititJobs

__all__ = ["content"]  # the fixture


@pytest.mark.slow
def test_a_study_is_carried_out_by_jobs(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = {**content, "conditions": {"one": content["conditions"]["one"]}}
    jobs = SubmititJobs(tmp_path / "jobs", "local", 1, {"timeout_min": 5})
    found = carry_out(one, tmp_path / "study", jobs)
    (arm,) = found["arms"]
    assert [cell["status"] for cell in arm["cells"]] == ["finished"]
    assert [growth["depth_after"] for growth in arm["cells"][0]["growths"]] == [2]


def test_a_job_that_fails_says_where_its_log_is(tmp_path: Path) -> None:
    from aiether.study.pool import Order

    jobs = SubmititJobs(tmp_path / "jobs", "local", 1, {"timeout_min": 5})
    jobs.submit(Order(tmp_path / "run", {"no_such_setting": 1}, keep_models=False))
    while not (ended := jobs.wait(1.0)):
        pass
    ((_, outcome),) = ended
    assert outcome.status == "failed"
    assert outcome.reason is not None
    assert "its log: " in outcome.reason
