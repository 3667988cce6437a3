from __future__ import annotations

import numpy as np
import pytest
import torch

from aiether.geometry import Extrapolator
from aiether.utils.geometry import GeometricExtrapolator


def test_the_readme_example_works_as_written():
    extrapolator = GeometricExtrapolator(beta0=0.1, gamma0=0.15, eta0=0.03, k_subspace=10, ell_orth=5)
    torch.manual_seed(0)
    W_history = list(torch.randn(15, 6, 8).cumsum(0))
    W_new, metrics = extrapolator.extrapolate(W_history)
    assert W_new.shape == (6, 8)
    assert metrics["tau"] == extrapolator.compute_tau(W_history)
    assert metrics["kappa"] == extrapolator.compute_kappa_eff(W_history)


def test_the_defaults_are_those_of_the_report():
    assert GeometricExtrapolator().extrapolator == Extrapolator(
        beta0=0.1, gamma0=0.15, eta0=0.03, k_subspace=10, ell_orth=5, tau_crit=2.0, kappa_crit=0.5,
        thresholds="raw", scale="unit", center=False, escape="modes", eps=1e-8,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 5), (7,), ()])
def test_lists_and_stacks_of_tensors_and_arrays_give_the_same(shape):
    stacked = np.random.default_rng(0).standard_normal((8, *shape)).cumsum(0)
    door = GeometricExtrapolator(k_subspace=3, scale="displacement")
    results = [
        door.extrapolate(history)[0]
        for history in (stacked, list(stacked), torch.from_numpy(stacked), list(torch.from_numpy(stacked)))
    ]
    assert isinstance(results[0], np.ndarray)
    assert isinstance(results[2], torch.Tensor)
    assert results[0].shape == shape
    assert all(np.array_equal(np.asarray(result), results[0]) for result in results)


def test_a_history_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        GeometricExtrapolator().compute_tau([])
