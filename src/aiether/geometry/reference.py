"""The same geometry written out with vectors and a full SVD, as the technical report defines it.

Slow and memory-hungry on purpose: it shares no formula with the Gram matrix path, so that the tests have
something to compare with, and it is what benchmarks/geometry.py measures against. float64 NumPy throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiether.geometry.extrapolator import RANK_TOLERANCE, Extrapolator

Array = NDArray[np.float64]


def velocities(snapshots: Sequence[NDArray[Any]]) -> Array:
    """V, (S-1, P): the differences of consecutive snapshots as rows (Definitions 3 and 11)."""
    points = np.stack([np.asarray(snapshot, dtype=np.float64).reshape(-1) for snapshot in snapshots])
    return np.diff(points, axis=0)


def metrics(snapshots: Sequence[NDArray[Any]], eps: float = 1e-8) -> dict[str, float]:
    """The values of `GeometryMetrics` that need the snapshots (Definitions 3 to 10)."""
    points = np.stack([np.asarray(snapshot, dtype=np.float64).reshape(-1) for snapshot in snapshots])
    velocity = np.diff(points, axis=0)
    lengths = np.linalg.norm(velocity, axis=1)
    delta = points[-1] - points[0]
    displacement = float(np.linalg.norm(delta))
    direction = delta / (displacement + eps)
    spread = points - points[0]  # exact where nothing moved; the variance is the same
    along = np.outer(velocity @ direction, direction)
    across = velocity - along
    mean = velocity.mean(axis=0)
    fluctuation = np.sqrt(np.mean(np.linalg.norm(velocity - mean, axis=1) ** 2))
    singular = np.linalg.svd(velocity, compute_uv=False)
    return {
        "tau": float(lengths.sum() / (displacement + eps)),
        "kappa": float(np.linalg.norm(across, axis=1).sum() / (np.linalg.norm(along, axis=1).sum() + eps)),
        "rho": float(
            4 * np.sum((spread - spread.mean(axis=0)) ** 2) / len(points) / (displacement + eps) ** 2
        ),
        "signal_to_noise": float(np.linalg.norm(mean) / (fluctuation + eps)),
        "participation_ratio": float(
            np.sum(singular**2) ** 2 / np.sum(singular**4) if singular[:1].any() else 0.0
        ),
        "displacement": displacement,
        "path_length": float(lengths.sum()),
    }


def extrapolate(
    snapshots: Sequence[NDArray[Any]], settings: Extrapolator, rank_tolerance: float = RANK_TOLERANCE
) -> tuple[Array, dict[str, Any]]:
    """Algorithm 1 with a whole number as k: the step W_new - W_{S-1} in float64, and what led to it."""
    velocity = velocities(snapshots)
    values = metrics(snapshots, settings.eps)
    sigma, modes, noise = _modes(velocity, settings.center, rank_tolerance)
    if settings.k_subspace == "auto":
        raise ValueError('the reference takes k_subspace as a whole number, not "auto"')
    k = min(settings.k_subspace, len(sigma))
    mean = velocity.mean(axis=0)
    acceleration = np.diff(velocity, axis=0).mean(axis=0) if len(velocity) > 1 else np.zeros_like(mean)
    inside = modes[:k].T @ (modes[:k] @ mean)
    residual = _outside(mean, modes, k, settings.center, noise / np.sqrt(len(velocity)))
    beta, gamma, eta = _gains(values, len(snapshots), settings)
    terms = [
        (beta, inside),
        (gamma, modes[:k].T @ (modes[:k] @ acceleration)),
        (eta, _escape(sigma, modes, mean, residual, k, settings)),
    ]
    unit = values["displacement"] if settings.scale == "displacement" else 1.0
    step = np.zeros_like(mean)
    for gain, vector in terms:
        step += unit * gain * _unit(vector, settings.eps)
    cosines = modes @ mean / max(float(np.linalg.norm(mean)), settings.eps)
    gains = {"beta": beta, "gamma": gamma, "eta": eta}
    spectrum = {"k_used": k, "rank": len(sigma), "sigma": sigma, "cosines": cosines}
    return step.reshape(np.shape(snapshots[-1])), values | gains | spectrum


def _outside(mean: Array, modes: Array, k: int, center: bool, noise: float) -> Array:
    """(I - P_k) V̄. Of V itself the modes span V̄ up to noise; of the centred HV they leave a part of it."""
    if not center:
        return modes[k:].T @ (modes[k:] @ mean)
    residual = mean - modes[:k].T @ (modes[:k] @ mean)
    return residual if np.linalg.norm(residual) > noise else np.zeros_like(mean)


def _modes(velocity: Array, center: bool, tolerance: float) -> tuple[Array, Array, float]:
    """Singular values and right singular vectors (rows) of V or HV above the noise, and where that begins."""
    noise = tolerance * float(np.linalg.svd(velocity, compute_uv=False)[0])
    matrix = velocity - velocity.mean(axis=0) if center else velocity
    _, sigma, modes = np.linalg.svd(matrix, full_matrices=False)
    keep = sigma > noise
    return sigma[keep], modes[keep], noise


def _escape(
    sigma: Array, modes: Array, mean: Array, residual: Array, k: int, settings: Extrapolator
) -> Array:
    if settings.escape == "residual" and np.linalg.norm(residual) >= settings.eps:
        return residual
    chosen = slice(k, min(k + settings.ell_orth, len(sigma)))
    signs = np.where(modes[chosen] @ mean < 0, -1.0, 1.0)
    return (signs * sigma[chosen]) @ modes[chosen]


def _gains(
    values: dict[str, float], num_snapshots: int, settings: Extrapolator
) -> tuple[float, float, float]:
    tau, kappa = values["tau"], values["kappa"]
    if values["path_length"] == 0:
        return 0.0, 0.0, 0.0
    beta, gamma = settings.beta0 / (tau + settings.eps), settings.gamma0 / (1 + kappa)
    if settings.thresholds == "normalised":
        walk = np.sqrt(max(num_snapshots - 1, 2)), np.sqrt(max(num_snapshots - 2, 1))
        straight = num_snapshots < 3
        tau, kappa = (0.0, 0.0) if straight else ((tau - 1) / (walk[0] - 1), kappa / walk[1])
    excess = max(tau - settings.tau_crit, 0.0) * max(kappa - settings.kappa_crit, 0.0)
    return beta, gamma, min(settings.eta0 * excess, settings.eta_max)


def _unit(vector: Array, eps: float) -> Array:
    return vector / (np.linalg.norm(vector) + eps)
