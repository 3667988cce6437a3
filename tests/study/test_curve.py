"""The baseline's cost-quality curve."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.study.curve import Point, cost_at, curve_of, loss_at

CURVE = curve_of([Point(400, 3.0), Point(100, 4.0), Point(200, 3.5)])


def test_two_runs_are_no_curve() -> None:
    assert curve_of([Point(1, 2), Point(2, 1)]) == ()


def test_between_two_lengths_it_is_straight_in_the_logarithm_of_the_cost() -> None:
    assert cost_at(CURVE, 3.25) == pytest.approx(200 * math.sqrt(2))
    assert loss_at(CURVE, 200 * math.sqrt(2)) == pytest.approx(3.25)


def test_the_runs_themselves_lie_on_it() -> None:
    for cost, loss in CURVE:
        assert cost_at(CURVE, loss) == pytest.approx(cost)
        assert loss_at(CURVE, cost) == pytest.approx(loss)


@pytest.mark.parametrize(("cost", "loss"), [(99, 4.01), (401, 2.99)])
def test_outside_of_the_lengths_that_were_run_nothing_is_said(cost: float, loss: float) -> None:
    assert cost_at(CURVE, loss) is None
    assert loss_at(CURVE, cost) is None


def test_a_longer_run_that_is_worse_makes_no_cost_of_it() -> None:
    bent = curve_of([Point(100, 4.0), Point(200, 3.0), Point(400, 3.5)])
    assert cost_at(bent, 3.5) == pytest.approx(100 * math.sqrt(2))
    assert cost_at(curve_of([Point(1, 2.0), Point(2, 2.0), Point(3, 2.0)]), 2.0) == 1


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=6), st.floats(0.01, 0.99))
def test_cost_and_loss_are_each_other_s_inverse_on_a_falling_curve(falls: list[float], share: float) -> None:
    points, loss = [], 10.0
    for number, fall in enumerate(falls):
        points.append(Point(100.0 * 2**number, loss))
        loss -= fall
    curve = curve_of(points)
    cost = curve[0].cost * (curve[-1].cost / curve[0].cost) ** share
    at = loss_at(curve, cost)
    assert at is not None
    assert cost_at(curve, at) == pytest.approx(cost, rel=1e-9)
