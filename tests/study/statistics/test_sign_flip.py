"""The sign-flip test against plain enumeration and SciPy, and how many seeds it takes."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aiether.study.statistics import seeds_needed, sign_flip_p, smallest_p


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_it_is_the_share_of_all_patterns(tenths: list[int]) -> None:
    """In exact fractions, so that ties count; the test itself sees tenths in floating point."""
    exact = [Fraction(value, 10) for value in tenths]
    sums = [
        sum(map(lambda s, x: s * x, signs, exact)) for signs in itertools.product((1, -1), repeat=len(exact))
    ]
    expected = sum(abs(total) >= abs(sum(exact)) for total in sums) / len(sums)
    assert sign_flip_p([value / 10 for value in tenths]) == expected


def test_it_agrees_with_scipy() -> None:
    for seed in range(5):
        drawn = np.random.default_rng(seed).normal(0.5, 1.0, 8)
        expected = stats.permutation_test(
            (drawn,), np.mean, permutation_type="samples", n_resamples=10_000, vectorized=True
        )
        assert sign_flip_p(drawn) == pytest.approx(expected.pvalue)


def test_many_seeds_are_drawn_from_close_to_the_exact_p_and_never_give_0() -> None:
    drawn = np.random.default_rng(1).normal(0.4, 1.0, 17)
    sums = np.zeros(1)
    for value in drawn:
        sums = np.concatenate([sums + value, sums - value])
    exact = np.mean(np.abs(sums) >= abs(drawn.sum()) - 1e-12)
    assert sign_flip_p(drawn) == pytest.approx(exact, abs=0.004)
    assert sign_flip_p(drawn) == sign_flip_p(drawn[::-1])
    assert sign_flip_p(np.ones(40)) == 1 / 100_001


def test_five_seeds_can_never_reach_a_twentieth() -> None:
    assert sign_flip_p([-0.031, -0.030, -0.029, -0.032, -0.031]) == smallest_p(5) == 0.0625
    assert [smallest_p(n) for n in (0, 1, 2, 6)] == [1.0, 1.0, 0.5, 0.03125]


@pytest.mark.parametrize(("comparisons", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8), (6, 8), (7, 9), (12, 9)])
def test_seeds_needed_for_holm_s_first_step(comparisons: int, needed: int) -> None:
    assert seeds_needed(0.05, comparisons) == needed
    assert smallest_p(needed) <= 0.05 / comparisons < smallest_p(needed - 1)


def test_seeds_needed_is_exact_at_powers_of_two() -> None:
    assert [seeds_needed(2.0**-k) for k in (1, 4, 5, 10)] == [2, 5, 6, 11]
    assert seeds_needed(0.999) == 2
    with pytest.raises(ValueError, match="0 comparisons"):
        seeds_needed(0.05, 0)
    with pytest.raises(ValueError, match="-1 seeds"):
        smallest_p(-1)
