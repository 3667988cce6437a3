"""Simulated studies: how often the corrected test errs under no difference, how often the interval covers.

Three planned comparisons with independent noise: there Holm's family-wise rate under no difference is
1 - (1 - alpha / 3)^3 = 4.9 %. With one baseline shared by all three the comparisons are correlated and the
rate lies a little lower (benchmarks/results/study_statistics.json).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from aiether.study.statistics import compare_planned, t_interval

STUDIES = 1_000
INTERVALS = 5_000


@pytest.fixture(autouse=True)
def _frozen() -> Iterator[None]:
    """statsmodels collects garbage at each correction: let it pass over what is alive already."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_under_no_difference_a_study_of_three_comparisons_errs_in_a_twentieth() -> None:
    drawn = np.random.default_rng(2025).normal(size=(STUDIES, 3, 5))
    corrected = uncorrected = sign_flip = 0
    for study in drawn:
        family = compare_planned({"a": study[0], "b": study[1], "c": study[2]}).values()
        corrected += any(comparison.distinguishable for comparison in family)
        uncorrected += any(comparison.t_p is not None and comparison.t_p <= 0.05 for comparison in family)
        sign_flip += any(comparison.sign_flip_p <= 0.05 for comparison in family)
    assert corrected / STUDIES == pytest.approx(0.05, abs=0.015)
    assert uncorrected / STUDIES > 0.1  # 14 % is what Holm prevents
    assert sign_flip == 0  # five seeds cannot


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_t_interval_covers_in_nineteen_of_twenty(seeds: int) -> None:
    covered = 0
    for drawn in np.random.default_rng(7).normal(-0.03, 0.01, size=(INTERVALS, seeds)):
        interval = t_interval(drawn)
        assert interval is not None
        covered += interval[0] <= -0.03 <= interval[1]
    assert covered / INTERVALS == pytest.approx(0.95, abs=0.015)
