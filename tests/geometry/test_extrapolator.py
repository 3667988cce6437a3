from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.geometry.histories import KINDS, history, with_spectrum

from aiether.geometry import Extrapolator, reference, velocity_gram
from aiether.geometry.extrapolator import RANK_TOLERANCE, RANK_TOLERANCE_BY_DTYPE

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
SETTINGS = st.fixed_dictionaries(
    {
        "k_subspace": st.integers(1, 22),
        "ell_orth": st.integers(0, 6),
        "scale": st.sampled_from(["unit", "displacement"]),
        "center": st.booleans(),
        "escape": st.sampled_from(["modes", "residual"]),
        "thresholds": st.sampled_from(["raw", "normalised"]),
        "tau_crit": st.sampled_from([0.2, 2.0]),
        "kappa_crit": st.sampled_from([0.2, 0.5]),
    }
)


def is_decided(found: dict[str, Any], extrapolator: Extrapolator) -> bool:
    """Whether gaps separate every mode that enters by itself, and no sign of one is left to rounding.

    docs/mathematics.md, "How exact the step is", says why these are the conditions.
    """
    squares = np.append((found["sigma"] / found["sigma"][:1]) ** 2, 0.0)
    k, last = found["k_used"], min(found["k_used"] + extrapolator.ell_orth, found["rank"])
    by_sign = found["eta"] > 0 and k < last
    cuts = range(k, last + 1) if by_sign else range(k, k + 1)
    separated = all(cut == 0 or squares[cut - 1] - squares[cut] > 1e-5 for cut in cuts)
    return separated and not (by_sign and np.abs(found["cosines"][k:last]).min() < 1e-6)


def step_of(snapshots: list[torch.Tensor], extrapolator: Extrapolator) -> tuple[np.ndarray, dict[str, Any]]:
    """The step in float64, before it is rounded into the dtype of the weights."""
    tolerance = RANK_TOLERANCE_BY_DTYPE.get(snapshots[0].dtype, RANK_TOLERANCE)
    weights, metrics = extrapolator.coefficients(velocity_gram(snapshots), tolerance)
    velocity = reference.velocities([s.double().numpy() for s in snapshots])
    return weights.numpy() @ velocity, metrics


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(KINDS),
    shape=SHAPES,
    num_snapshots=st.integers(2, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    rank=st.integers(1, 19),
    options=SETTINGS,
)
def test_agrees_with_the_reference(kind, shape, num_snapshots, dtype, seed, rank, options):
    extrapolator = Extrapolator(**options)
    snapshots = list(history(kind, shape, num_snapshots, seed, rank).to(dtype))
    tolerance = RANK_TOLERANCE_BY_DTYPE.get(dtype, RANK_TOLERANCE)
    arrays = [s.double().numpy() for s in snapshots]
    expected, found = reference.extrapolate(arrays, extrapolator, tolerance)
    step, metrics = step_of(snapshots, extrapolator)
    if 0 < found["displacement"] < 1e-4 * found["path_length"]:
        return
    unit = found["displacement"] if options["scale"] == "displacement" else 1.0
    error = np.linalg.norm(step - expected.reshape(-1))
    gains = [abs(found[name]) + abs(metrics[name]) for name in ("beta", "gamma", "eta")]
    assert error <= unit * sum(gains) * (1 + 1e-6)
    if metrics["rank"] == found["rank"] and found["rank"] > 0 and is_decided(found, extrapolator):
        assert metrics["k_used"] == found["k_used"]
        # kappa of a straight line is only known absolutely; through gamma and eta the step inherits that.
        inherited = unit * sum(abs(found[name] - metrics[name]) for name in ("beta", "gamma", "eta"))
        assert error <= 1e-6 * unit * (found["beta"] + found["gamma"] + found["eta"]) + inherited


@pytest.mark.parametrize("k", [1, 4, 8, 12])
@pytest.mark.parametrize("escape", ["modes", "residual"])
@pytest.mark.parametrize("center", [False, True])
def test_each_term_agrees_where_the_spectrum_has_gaps(k, escape, center):
    snapshots = list(history("spectrum", (9, 11), 15, seed=8, rank=8))
    for gains in ({"beta0": 1.0}, {"gamma0": 1.0}, {"eta0": 1.0}):
        only: dict[str, Any] = {
            "beta0": 0.0,
            "gamma0": 0.0,
            "eta0": 0.0,
            "tau_crit": 0.0,
            "kappa_crit": 0.0,
            **gains,
        }
        extrapolator = Extrapolator(k_subspace=k, escape=escape, center=center, eta_max=1e6, **only)
        expected, found = reference.extrapolate([s.numpy() for s in snapshots], extrapolator)
        result, metrics = extrapolator.extrapolate(snapshots)
        step = (result - snapshots[-1]).numpy()
        assert np.linalg.norm(step - expected) <= 1e-6 * np.linalg.norm(expected) + 1e-12
        assert (metrics["rank"], metrics["k_used"]) == (found["rank"], min(k, found["rank"]))
        assert metrics["step_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-6, abs=1e-12)


def test_the_terms_have_the_lengths_of_their_gains():
    snapshots = list(history("walk", (20, 30), 15, seed=9))
    _, metrics = Extrapolator().extrapolate(snapshots)
    assert metrics["velocity_norm"] == pytest.approx(metrics["beta"], rel=1e-6)
    assert metrics["acceleration_norm"] == pytest.approx(metrics["gamma"], rel=1e-6)
    assert metrics["escape_norm"] == pytest.approx(metrics["eta"], rel=1e-6)
    assert metrics["eta"] > 0
    _, scaled = Extrapolator(scale="displacement").extrapolate(snapshots)
    assert scaled["step_norm"] == pytest.approx(metrics["step_norm"] * metrics["displacement"], rel=1e-6)


def test_with_the_reports_defaults_five_snapshots_leave_no_escape():
    _, metrics = Extrapolator().extrapolate(list(history("walk", (50, 50), 5, seed=10)))
    assert (metrics["rank"], metrics["k_used"], metrics["num_escape_modes"]) == (4, 4, 0)
    assert metrics["escape_norm"] == 0


def test_the_escape_never_points_against_the_mean_velocity():
    for seed in range(20):
        snapshots = list(history("decaying", (40,), 12, seed))
        extrapolator = Extrapolator(beta0=0.0, gamma0=0.0, k_subspace=2, tau_crit=0.0, kappa_crit=0.0)
        result, metrics = extrapolator.extrapolate(snapshots)
        assert metrics["escape_norm"] > 0
        assert float((result - snapshots[-1]) @ (snapshots[-1] - snapshots[0])) > 0


def test_eta_needs_both_excesses():
    low_tau = Extrapolator(tau_crit=100.0, kappa_crit=100.0)
    _, metrics = low_tau.extrapolate(list(history("walk", (50,), 10, seed=11)))
    assert metrics["eta"] == 0  # two negative factors do not make a positive one


def test_auto_finds_the_gap_and_falls_back_to_the_participation_ratio():
    rng = np.random.default_rng(12)
    for values, expected in (([1.0, 0.9, 0.8, 0.1, 0.09, 0.08], 3), ([1.0, 0.95, 0.9, 0.85, 0.8, 0.75], 6)):
        velocity = with_spectrum(np.array(values), 8, 40, rng)
        _, metrics = Extrapolator(k_subspace="auto").coefficients(torch.from_numpy(velocity @ velocity.T))
        assert metrics["k_used"] == expected


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("escape", ["modes", "residual"])
@pytest.mark.parametrize("num_snapshots", [2, 3, 10])
def test_without_movement_the_last_snapshot_comes_back(center, escape, num_snapshots):
    snapshots = list(history("still", (4, 5), num_snapshots, seed=13).float())
    result, metrics = Extrapolator(center=center, escape=escape).extrapolate(snapshots)
    assert torch.equal(result, snapshots[-1])
    assert (metrics["rank"], metrics["step_norm"]) == (0, 0)


@pytest.mark.parametrize("kind", ["return", "straight"])
@pytest.mark.parametrize("scale", ["unit", "displacement"])
def test_degenerate_paths_give_a_bounded_step(kind, scale):
    snapshots = list(history(kind, (30,), 15, seed=14))
    result, metrics = Extrapolator(scale=scale, k_subspace=3).extrapolate(snapshots)
    unit = metrics["displacement"] if scale == "displacement" else 1.0
    assert bool(torch.isfinite(result).all())
    assert float((result - snapshots[-1]).norm()) <= unit * (0.1 + 0.15 + 1.0) * (1 + 1e-6)


def test_two_snapshots_have_a_velocity_but_no_acceleration():
    snapshots = list(history("walk", (6,), 2, seed=15))
    result, metrics = Extrapolator().extrapolate(snapshots)
    direction = (snapshots[1] - snapshots[0]) / (snapshots[1] - snapshots[0]).norm()
    torch.testing.assert_close(result, snapshots[1] + 0.1 * direction, rtol=1e-6, atol=1e-6)
    assert metrics["acceleration_norm"] == 0


def test_the_kind_of_the_last_snapshot_is_kept():
    points = history("walk", (2, 3, 4), 6, seed=16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        result, _ = Extrapolator().extrapolate(list(points.to(dtype)))
        assert (result.dtype, result.shape) == (dtype, (2, 3, 4))
    scalar, _ = Extrapolator().extrapolate(list(history("walk", (), 6, seed=17)))
    assert scalar.shape == ()


def test_half_precision_noise_is_no_mode():
    drift = torch.linspace(0, 2, 12)[:, None] * torch.ones(2000) + 1.0
    snapshots = [s.bfloat16() for s in drift]
    _, metrics = Extrapolator().extrapolate(snapshots)
    exact, _ = Extrapolator().coefficients(velocity_gram(snapshots), 0.0)
    assert metrics["rank"] < len(exact)
    assert metrics["rank"] == 1


def test_bad_histories_are_refused():
    snapshots = list(history("walk", (3,), 4, seed=18))
    with pytest.raises(ValueError, match="at least 2"):
        Extrapolator().extrapolate(snapshots[:1])
    with pytest.raises(ValueError, match="3 velocities"):
        Extrapolator().extrapolate(snapshots, torch.eye(2))
    broken = [*snapshots[:-1], torch.full((3,), math.nan, dtype=torch.float64)]
    with pytest.raises(ValueError, match="diverged"):
        Extrapolator().extrapolate(broken)
    large = [torch.full((2,), value, dtype=torch.float16) for value in (60000.0, 62000.0, 65504.0)]
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        Extrapolator(beta0=1e5).extrapolate(large)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_subspace": 0}, 'k_subspace is 0, but must be "auto"'),
        ({"k_subspace": "many"}, "k_subspace is 'many'"),
        ({"k_subspace": True}, "k_subspace is True"),
        ({"ell_orth": -1}, "ell_orth is -1"),
        ({"beta0": math.nan}, "beta0 is nan"),
        ({"eps": 0.0}, "above 0"),
        ({"scale": "metres"}, "allowed are unit, displacement"),
        ({"escape": "up"}, "allowed are modes, residual"),
        ({"thresholds": "soft"}, "allowed are raw, normalised"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Extrapolator(**options)
