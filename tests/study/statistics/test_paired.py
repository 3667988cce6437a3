"""Paired differences: published examples, SciPy, and what degenerate data give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower
from tests.study.statistics.published import FILM_FIRST, FILM_SECOND, SLEEP_FIRST, SLEEP_SECOND, ZEA_MAYS

from aiether.study.statistics import detectable_dz, paired, sign_flip_p

DIFFERENCES = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=9)


def test_student_s_sleep_data() -> None:
    result = paired(np.subtract(SLEEP_FIRST, SLEEP_SECOND))
    assert result.n == 10
    assert result.mean == pytest.approx(-1.58)
    assert result.t_p == pytest.approx(0.002833, abs=5e-7)
    assert result.ci95 == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert result.mean is not None
    assert result.sd is not None
    assert result.mean / result.sd * math.sqrt(10) == pytest.approx(-4.0621, abs=5e-5)


def test_lakens_s_films() -> None:
    result = paired(np.subtract(FILM_FIRST, FILM_SECOND))
    assert result.dz == pytest.approx(1.50, abs=0.005)
    assert result.t_p == pytest.approx(0.001, abs=5e-4)
    assert result.ci95 == pytest.approx((0.52, 1.48), abs=0.005)


def test_fisher_s_zea_mays() -> None:
    result = paired(ZEA_MAYS)
    assert result.sign_flip_p == 2 * 863 / 32768
    assert result.dz is not None
    assert result.dz * math.sqrt(15) == pytest.approx(2.148, abs=5e-4)


@settings(max_examples=60, deadline=None)
@given(DIFFERENCES)
def test_it_agrees_with_scipy(differences: list[float]) -> None:
    result = paired(differences)
    if len(set(differences)) == 1:
        assert (result.sd, result.t_p, result.dz) == (0.0, 0.0 if differences[0] else 1.0, None)
        return
    expected = stats.ttest_1samp(differences, 0.0)
    interval = expected.confidence_interval(0.95)
    assert result.t_p == pytest.approx(expected.pvalue, rel=1e-9)  # pyright: ignore[reportAttributeAccessIssue]
    assert result.ci95 == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(DIFFERENCES, st.randoms(use_true_random=False), st.floats(0.01, 100.0))
def test_signs_order_and_unit_change_what_they_should(differences: list[float], random, unit: float) -> None:
    result, shuffled = paired(differences), list(differences)
    random.shuffle(shuffled)
    other, swapped = paired(shuffled), paired([-x for x in differences])
    scaled = paired([unit * x for x in differences])
    for again in (other, swapped, scaled):
        assert again.sign_flip_p == result.sign_flip_p
        assert again.t_p == pytest.approx(result.t_p, rel=1e-6, abs=1e-12)
    assert swapped.mean == -result.mean if result.mean else swapped.mean == 0.0
    assert scaled.sd == pytest.approx(unit * result.sd, rel=1e-9) if result.sd else True


@settings(max_examples=40, deadline=None)
@given(DIFFERENCES, st.floats(-100.0, 100.0).map(lambda x: round(x, 2)))
def test_a_shift_moves_the_interval_and_leaves_its_width(differences: list[float], shift: float) -> None:
    before, after = paired(differences), paired([x + shift for x in differences])
    assert before.ci95 is not None
    assert after.ci95 == pytest.approx(tuple(end + shift for end in before.ci95), rel=1e-9, abs=1e-6)
    assert after.detectable == pytest.approx(before.detectable, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3, 0.0025])
def test_the_detectable_difference_is_found_in_four_of_five_studies(n: int, alpha: float) -> None:
    drawn = np.random.default_rng(n).normal(detectable_dz(n, alpha), 1.0, (40_000, n))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue <= alpha  # pyright: ignore[reportAttributeAccessIssue]
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_the_detectable_difference_is_that_of_statsmodels_where_this_is_right() -> None:
    for n in (5, 8, 20):
        expected = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
        assert detectable_dz(n, 0.05) == pytest.approx(expected, rel=1e-5)
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0]).detectable == pytest.approx(math.sqrt(2.5) * detectable_dz(5))


def test_too_few_or_equal_seeds_have_defined_results() -> None:
    nothing, one = paired([]), paired([0.5])
    assert (nothing.n, nothing.mean, nothing.ci95, nothing.t_p, nothing.sign_flip_p) == (
        0,
        None,
        None,
        None,
        1.0,
    )
    assert (one.n, one.mean, one.sd, one.ci95, one.t_p, one.sign_flip_p) == (1, 0.5, None, None, None, 1.0)
    zeros, equal = paired([0.0] * 5), paired([0.1] * 5)
    assert (zeros.sd, zeros.ci95, zeros.t_p, zeros.sign_flip_p, zeros.dz) == (0.0, (0.0, 0.0), 1.0, 1.0, None)
    assert (equal.sd, equal.t_p, equal.sign_flip_p, equal.detectable) == (0.0, 0.0, 0.0625, 0.0)


@pytest.mark.parametrize(
    ("differences", "alpha", "words"),
    [
        ([0.1, math.nan], 0.05, "NaN"),
        ([0.1, math.inf], 0.05, "infinity"),
        ([[0.1], [0.2]], 0.05, r"shape \(2, 1\)"),
        ([0.1, 0.2], 0.0, "alpha is 0.0"),
        ([0.1, 0.2], 5.0, "alpha is 5.0"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(differences, alpha: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired(differences, alpha=alpha)


def test_a_sign_flip_test_of_one_difference_is_no_test() -> None:
    assert sign_flip_p([3.0]) == 1.0
