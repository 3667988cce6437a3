"""What the shape of a trajectory says, computed from the Gram matrix of its velocities alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# A displacement below this part of the path cannot be told from zero: the sum 1ᵀG1 carries a rounding error
# of a few dozen units in the last place of (path length)² (docs/mathematics.md, "Resolution").
DISPLACEMENT_RESOLUTION = math.sqrt(64 * 2.0**-53)


@dataclass(frozen=True)
class GeometryMetrics:
    """Geometry of one trajectory of `num_snapshots` = S points.

    Attributes:
        tau: temporal stretch factor, path length over displacement (technical report, Definition 5).
        kappa: effective curvature, lateral over forward movement (Definition 7).
        tau_normalised: (tau - 1) / (√(S-1) - 1): 0 on a straight line, 1 for a random walk in many
            dimensions, whatever S. 0 when S = 2, where every path is straight.
        kappa_normalised: kappa / √(S-2), with the same two fixed points. 0 when S = 2.
        rho: spectral tortuosity, four times the variance of the snapshots over the squared displacement
            (Definition 10).
        rho_straight: what rho is on a straight uniform path, (S+1) / (3(S-1)).
        rho_bound: the least that rho can be, 2/S. (The report's bound of 1 does not hold.)
        signal_to_noise: length of the mean velocity over the root mean square deviation from it. The report's
            own ratio depends on a subspace; `Extrapolator.coefficients` gives it.
        participation_ratio: effective number of velocity modes, (Σλ)² / Σλ², from 1 to S-1; 0 without
            movement.
        displacement: ‖W_{S-1} - W_0‖, in the units of the weights.
        path_length: Σ‖V_t‖, in the units of the weights.
        num_snapshots: S.
    """

    tau: float
    kappa: float
    tau_normalised: float
    kappa_normalised: float
    rho: float
    rho_straight: float
    rho_bound: float
    signal_to_noise: float
    participation_ratio: float
    displacement: float
    path_length: float
    num_snapshots: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def metrics_from_gram(gram: Tensor, eps: float = 1e-8) -> GeometryMetrics:
    """All metrics of a trajectory from its velocity Gram matrix.

    Args:
        gram: (S-1, S-1) symmetric, S >= 2; computed in float64. For several tensors taken as one point of the
            product space (Definition 1) give the sum of their Gram matrices.
        eps: added to every divisor, in the units of the weights; it defines the result where nothing moved.

    Raises:
        ValueError: not a square matrix, no velocity in it, or values that are not finite.
    """
    gram = checked_gram(gram)
    num_velocities = gram.shape[0]
    num_snapshots = num_velocities + 1
    lengths = gram.diagonal().clamp(min=0).sqrt()
    path_length = float(lengths.sum())
    displacement = _displacement(gram, path_length)
    tau = path_length / (displacement + eps)
    kappa = _curvature(gram, lengths, displacement, eps)
    mean_squared = displacement**2 / num_velocities**2
    fluctuation = math.sqrt(max(float(lengths.square().mean()) - mean_squared, 0.0))
    tau_normalised, kappa_normalised = normalised(tau, kappa, num_snapshots)
    return GeometryMetrics(
        tau=tau,
        kappa=kappa,
        tau_normalised=tau_normalised,
        kappa_normalised=kappa_normalised,
        rho=4 * _variance(gram) / (displacement + eps) ** 2,
        rho_straight=(num_snapshots + 1) / (3 * (num_snapshots - 1)),
        rho_bound=2 / num_snapshots,
        signal_to_noise=math.sqrt(mean_squared) / (fluctuation + eps),
        participation_ratio=_participation_ratio(gram),
        displacement=displacement,
        path_length=path_length,
        num_snapshots=num_snapshots,
    )


def checked_gram(gram: Tensor) -> Tensor:
    """The Gram matrix as float64 on the CPU, or a `ValueError` that says what is wrong with it."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(
            f"a Gram matrix is square, got shape {tuple(gram.shape)}: use Trajectory.gram or velocity_gram"
        )
    if gram.shape[0] == 0:
        raise ValueError(
            "the Gram matrix is empty: geometry needs at least 2 snapshots, so collect more first"
        )
    gram = gram.detach().cpu().double()
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            "the Gram matrix holds NaN or infinite values, so some snapshot does too: "
            "training has diverged, go back to an earlier checkpoint or lower the learning rate"
        )
    return gram


def normalised(tau: float, kappa: float, num_snapshots: int) -> tuple[float, float]:
    """tau and kappa on the scale on which 0 is a straight line and 1 a random walk in many dimensions."""
    if num_snapshots < 3:
        return 0.0, 0.0
    tau_walk, kappa_walk = math.sqrt(num_snapshots - 1), math.sqrt(num_snapshots - 2)
    return max((tau - 1) / (tau_walk - 1), 0.0), kappa / kappa_walk


def _displacement(gram: Tensor, path_length: float) -> float:
    displacement = math.sqrt(max(float(gram.sum()), 0.0))
    return displacement if displacement > DISPLACEMENT_RESOLUTION * path_length else 0.0


def _curvature(gram: Tensor, lengths: Tensor, displacement: float, eps: float) -> float:
    shortfall = displacement / (displacement + eps)  # length of the report's direction Δ / (‖Δ‖ + ε)
    forward = gram.sum(dim=1) / (displacement + eps) if displacement > 0 else torch.zeros_like(lengths)
    along = forward.abs() * shortfall
    across = (lengths.square() - forward.square() * (2 - shortfall**2)).clamp(min=0).sqrt()
    return float(across.sum()) / (float(along.sum()) + eps)


def _variance(gram: Tensor) -> float:
    """Tr Σ_real = (1/S) Σ‖W_t - W̄‖², which is ⟨M, G⟩ / S with the kernel of a Brownian bridge as M."""
    num_snapshots = gram.shape[0] + 1
    index = torch.arange(1, num_snapshots, dtype=torch.float64)
    bridge = torch.minimum(index[:, None], index) * (num_snapshots - torch.maximum(index[:, None], index))
    return max(float((bridge * gram).sum()) / num_snapshots**2, 0.0)


def _participation_ratio(gram: Tensor) -> float:
    trace = float(gram.trace())
    return 1 / float((gram / trace).square().sum()) if trace > 0 else 0.0
