from __future__ import annotations

from pathlib import Path

import pytest
from tests.study.report.fake_study import MANY, write_fake_study

from aiether.study.report import write_study_report


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conditions, four lengths of the baseline, factors, failures, missing runs: with its report."""
    folder = write_fake_study(tmp_path_factory.mktemp("studies") / "ablation", MANY)
    write_study_report(folder)
    return folder
