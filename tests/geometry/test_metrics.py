from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.geometry.histories import KINDS, history

from aiether.geometry import metrics_from_gram, reference, velocity_gram
from aiether.geometry.metrics import DISPLACEMENT_RESOLUTION

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    shape=SHAPES,
    num_snapshots=st.integers(2, 20),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_reference(kind, shape, num_snapshots, dtype, seed):
    snapshots = list(history(kind, shape, num_snapshots, seed).to(dtype))
    expected = reference.metrics([s.double().numpy() for s in snapshots])
    found = metrics_from_gram(velocity_gram(snapshots)).to_dict()
    path, displacement = expected["path_length"], expected["displacement"]
    assert found["path_length"] == pytest.approx(path, rel=1e-6)
    assert found["participation_ratio"] == pytest.approx(expected["participation_ratio"], rel=1e-6)
    # docs/mathematics.md, "Resolution": ‖Δ‖² is known to ζ·(path length)², and what it divides accordingly.
    assert abs(found["displacement"] ** 2 - displacement**2) <= (DISPLACEMENT_RESOLUTION * path) ** 2
    if 0 < displacement < 1e-4 * path:
        return
    tau = expected["tau"]
    for name in ("tau", "rho", "displacement"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-30)
    resolution = DISPLACEMENT_RESOLUTION * (1 + tau) * tau if displacement > 0 else 0.0
    assert found["kappa"] == pytest.approx(expected["kappa"], rel=1e-6, abs=resolution + 1e-30)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, num_snapshots=st.integers(2, 20), seed=st.integers(0, 2**31))
def test_rho_stays_above_its_bound(shape, num_snapshots, seed):
    metrics = metrics_from_gram(velocity_gram(list(history("decaying", shape, num_snapshots, seed))))
    assert metrics.rho >= metrics.rho_bound * (1 - 1e-6)
    assert metrics.rho_bound == 2 / num_snapshots


@pytest.mark.parametrize("num_snapshots", [3, 5, 12])
def test_the_bound_of_rho_is_attained_by_waiting_in_the_middle(num_snapshots):
    points = torch.full((num_snapshots, 1), 0.5, dtype=torch.float64)
    points[0], points[-1] = 0.0, 1.0
    assert metrics_from_gram(velocity_gram(list(points))).rho == pytest.approx(2 / num_snapshots)


@pytest.mark.parametrize("num_snapshots", [2, 3, 5, 15, 20])
def test_a_straight_uniform_path(num_snapshots):
    points = torch.arange(num_snapshots).double()[:, None] * torch.ones(50, dtype=torch.float64)
    metrics = metrics_from_gram(velocity_gram(list(points)))
    assert metrics.tau == pytest.approx(1)
    assert metrics.kappa < 1e-6
    assert metrics.tau_normalised < 1e-6
    assert metrics.kappa_normalised < 1e-6
    assert metrics.rho == pytest.approx(metrics.rho_straight)
    assert metrics.participation_ratio == pytest.approx(1)


@pytest.mark.parametrize("num_snapshots", [3, 5, 10, 15, 20])
def test_a_random_walk_in_many_dimensions_normalises_to_one(num_snapshots):
    metrics = metrics_from_gram(
        velocity_gram(list(history("walk", (200, 250), num_snapshots, seed=5).float()))
    )
    assert metrics.tau_normalised == pytest.approx(1, rel=0.05)
    assert metrics.kappa_normalised == pytest.approx(1, rel=0.05)
    assert metrics.tau == pytest.approx(math.sqrt(num_snapshots - 1), rel=0.05)
    assert metrics.rho == pytest.approx(2 * (num_snapshots + 1) / (3 * num_snapshots), rel=0.05)
    assert metrics.participation_ratio == pytest.approx(num_snapshots - 1, rel=0.05)


def test_ratios_do_not_depend_on_the_unit_of_the_weights():
    snapshots = list(history("decaying", (40,), 9, seed=6))
    one = metrics_from_gram(velocity_gram(snapshots))
    thousand = metrics_from_gram(velocity_gram([1000 * s for s in snapshots]))
    assert thousand.path_length == pytest.approx(1000 * one.path_length)
    same = replace(thousand, path_length=one.path_length, displacement=one.displacement)
    assert same.to_dict() == pytest.approx(one.to_dict(), rel=1e-6)


@pytest.mark.parametrize("num_snapshots", [2, 3, 8])
def test_no_movement_is_defined(num_snapshots):
    metrics = metrics_from_gram(torch.zeros(num_snapshots - 1, num_snapshots - 1))
    values = metrics.to_dict()
    assert all(math.isfinite(value) for value in values.values())
    assert (metrics.tau, metrics.kappa, metrics.rho, metrics.tau_normalised) == (0, 0, 0, 0)


def test_a_return_to_the_start_is_defined_and_stagnant():
    metrics = metrics_from_gram(velocity_gram(list(history("return", (30,), 8, seed=7))))
    assert all(math.isfinite(value) for value in metrics.to_dict().values())
    assert metrics.displacement == 0
    assert metrics.tau == pytest.approx(metrics.path_length / 1e-8)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(0, 0), "at least 2 snapshots"),
        (torch.zeros(2, 3), "square"),
        (torch.full((2, 2), math.nan), "diverged"),
        (torch.full((2, 2), math.inf), "diverged"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, message):
    with pytest.raises(ValueError, match=message):
        metrics_from_gram(gram)
