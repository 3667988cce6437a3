from __future__ import annotations

import pytest

from aiether import GrowthConfig
from aiether.growth import LrFactors, LrPolicy, lr_factors
from aiether.growth.moments import new_moments


def test_a_rewarm_rises_linearly_to_one_and_stays() -> None:
    new = [lr_factors("rewarm_new", step, 4) for step in range(6)]
    assert [factors.new for factors in new] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert {factors.old for factors in new} == {1}
    every = [lr_factors("rewarm_all", step, 4) for step in range(6)]
    assert [(factors.new, factors.old) for factors in every] == [(f.new, f.new) for f in new]


@pytest.mark.parametrize("policy", ["unchanged", "restart"])
def test_other_policies_scale_nothing(policy: LrPolicy) -> None:
    assert lr_factors(policy, 0, 4) == LrFactors(1, 1)


def test_policies_that_cannot_work_are_refused() -> None:
    GrowthConfig(lr_policy="rewarm_new", protocol="none").validate()
    with pytest.raises(ValueError, match="a warm-up and a restart of its own"):
        GrowthConfig(lr_policy="rewarm_new", protocol="report").validate()
    with pytest.raises(ValueError, match="rewarm_steps"):
        GrowthConfig(rewarm_steps=0).validate()
    with pytest.raises(ValueError, match="rewarm_all"):
        GrowthConfig(lr_policy="rewarm").validate()  # type: ignore[arg-type]


def test_state_that_does_not_start_at_zero_is_left_to_the_optimizer() -> None:
    nadam = {"step": 3, "mu_product": 0.2, "exp_avg": 1.0}
    assert new_moments(nadam, "zero") == {}
    assert new_moments(nadam, "copy") == nadam
    assert new_moments({"step": 3, "exp_avg": 1.0}, "zero") == {"step": 0, "exp_avg": 0.0}
    unknown = {"step": 3, "state1": 7, "qmap1": 1.0}  # an 8-bit state and its code book
    assert new_moments(unknown, "zero") == {}
