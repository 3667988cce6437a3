"""New weights from a trajectory: last point + velocity + acceleration + escape (technical report, section 3).

All three terms are combinations of the velocities, W_new = W_{S-1} + Vᵀc, so the work is a small eigenvalue
problem for c and one weighted sum. docs/mathematics.md derives the formulas and lists where they depart from
the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aiether.geometry.gram import TensorLike, add_velocities, as_tensor, velocity_gram
from aiether.geometry.metrics import GeometryMetrics, checked_gram, metrics_from_gram

Thresholds = Literal["raw", "normalised"]
Scale = Literal["unit", "displacement"]
Escape = Literal["modes", "residual"]

# Modes below this part of the largest singular value are noise. The squares of singular values carry a
# relative rounding error of some 1e-15, so 1e-6 leaves three digits; half precision rounds the snapshots
# themselves.
RANK_TOLERANCE = 1e-6
RANK_TOLERANCE_BY_DTYPE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# A direction counts as orthogonal to the mean velocity below this cosine; its sign then has to come from
# elsewhere.
_SIGN_TOLERANCE = 1e-9
# A ratio of neighbouring singular values from which k="auto" takes the spectrum to have a gap.
_GAP_RATIO = 2.0


@dataclass(frozen=True, kw_only=True)
class Extrapolator:
    """Adaptive geometric extrapolation (technical report, Definition 18). Defaults are the report's.

    Attributes:
        beta0, gamma0, eta0: base gains of velocity, acceleration and escape.
        k_subspace: dimension of the dynamic subspace (Definition 11); min(k, rank) is used. "auto" cuts at
            the widest spectral gap, or at the participation ratio where there is none.
        ell_orth: how many modes after the first k make the escape direction (Definition 14).
        tau_crit, kappa_crit: thresholds above both of which the escape term acts (Definition 17).
        thresholds: whether they are compared with the raw or the normalised tau and kappa.
        scale: "unit" adds terms of absolute length (the report); "displacement" multiplies them by ‖Δ‖.
        center: subtract the mean velocity before the decomposition (the README; the report does not).
        escape: "modes" (Definition 14) or "residual" (Algorithm 1: what the subspace leaves of the mean
            velocity, and the modes where that vanishes).
        eta_max: upper limit of the escape gain, which has none in the report and would throw the weights away
            where a trajectory returns to its start (tau and kappa are then of the order of 1/eps).
        eps: added to every divisor, in the units of the weights.
    """

    beta0: float = 0.1
    gamma0: float = 0.15
    eta0: float = 0.03
    k_subspace: int | Literal["auto"] = 10
    ell_orth: int = 5
    tau_crit: float = 2.0
    kappa_crit: float = 0.5
    thresholds: Thresholds = "raw"
    scale: Scale = "unit"
    center: bool = False
    escape: Escape = "modes"
    eta_max: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_choice("thresholds", self.thresholds, get_args(Thresholds))
        _check_choice("scale", self.scale, get_args(Scale))
        _check_choice("escape", self.escape, get_args(Escape))
        for name in ("beta0", "gamma0", "eta0", "eta_max"):
            _check(name, getattr(self, name), "a finite number, 0 or more", lambda value: value >= 0)
        for name in ("tau_crit", "kappa_crit"):
            _check(name, getattr(self, name), "a finite number", lambda _: True)
        _check("eps", self.eps, "a finite number above 0", lambda value: value > 0)
        _check("ell_orth", self.ell_orth, "a whole number, 0 or more", _whole_from(0))
        if self.k_subspace != "auto":
            _check("k_subspace", self.k_subspace, '"auto" or a whole number, 1 or more', _whole_from(1))

    def coefficients(
        self, gram: Tensor, rank_tolerance: float = RANK_TOLERANCE
    ) -> tuple[Tensor, dict[str, Any]]:
        """The weights c of the velocities in W_new = W_{S-1} + sum_t c_t V_t.

        Args:
            gram: velocity Gram matrix (S-1, S-1), S >= 2.
            rank_tolerance: singular values below this part of the largest count as zero.

        Returns:
            c, (S-1,) float64 on the CPU, and the metrics: those of `GeometryMetrics`, the gains `beta`,
            `gamma`, `eta`, the subspace (`k_used`, `rank`, `num_escape_modes`, `subspace_signal_to_noise` of
            the report's Remark 16) and the lengths of the three terms as added (`velocity_norm`,
            `acceleration_norm`, `escape_norm`, `step_norm` for their sum), in the units of the weights.

        Raises:
            ValueError: the Gram matrix is empty, not square or not finite.
        """
        gram = checked_gram(gram)
        metrics = metrics_from_gram(gram, self.eps)
        modes = _Modes.of(gram, self.center, rank_tolerance)
        k_used = min(
            modes.rank, _auto_dimension(modes.values) if self.k_subspace == "auto" else self.k_subspace
        )
        mean, acceleration = mean_velocity_weights(len(gram)), mean_acceleration_weights(len(gram))
        inside = modes.project(mean, 0, k_used)
        residual = modes.outside(mean, k_used)
        escape = self._escape(modes, mean, residual, k_used)
        beta, gamma, eta = self.gains(metrics)
        unit = metrics.displacement if self.scale == "displacement" else 1.0
        terms = [
            unit * gain * direction / (modes.length(direction) + self.eps)
            for gain, direction in (
                (beta, inside),
                (gamma, modes.project(acceleration, 0, k_used)),
                (eta, escape),
            )
        ]
        total = terms[0] + terms[1] + terms[2]
        report = metrics.to_dict() | {
            "beta": beta,
            "gamma": gamma,
            "eta": eta,
            "k_used": k_used,
            "rank": modes.rank,
            "num_escape_modes": max(min(k_used + self.ell_orth, modes.rank) - k_used, 0),
            "subspace_signal_to_noise": modes.length(inside) / (modes.length(residual) + self.eps),
            "velocity_norm": modes.length(terms[0]),
            "acceleration_norm": modes.length(terms[1]),
            "escape_norm": modes.length(terms[2]),
            "step_norm": modes.length(total),
        }
        return total, report

    def extrapolate(
        self, snapshots: Sequence[TensorLike], gram: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The new weights of one tensor.

        Args:
            snapshots: S >= 2 tensors or arrays of one shape, oldest first.
            gram: their velocity Gram matrix, where it is already known (`Trajectory.gram`).

        Returns:
            W_new in the shape, dtype and device of the last snapshot, and the metrics of `coefficients`.
            Where nothing moved W_new is the last snapshot.

        Raises:
            ValueError: fewer than two snapshots, unequal shapes, a Gram matrix of another length, NaN or
                infinite values in the snapshots or, after rounding to their dtype, in the result.
        """
        gram = velocity_gram(snapshots) if gram is None else gram
        if gram.shape != (len(snapshots) - 1,) * 2:
            raise ValueError(
                f"the Gram matrix is {tuple(gram.shape)}, but {len(snapshots)} snapshots have "
                f"{len(snapshots) - 1} velocities: give the Gram matrix of these snapshots, or none"
            )
        dtype = as_tensor(snapshots[-1]).dtype
        weights, metrics = self.coefficients(gram, RANK_TOLERANCE_BY_DTYPE.get(dtype, RANK_TOLERANCE))
        result = add_velocities(snapshots, weights)
        if not _all_finite(result):
            raise ValueError(
                f"the extrapolated weights are not finite in {dtype}: the step of length "
                f"{metrics['step_norm']:.3g} leaves its range; use smaller gains, or copy the layer"
            )
        return result, metrics

    def gains(self, metrics: GeometryMetrics) -> tuple[float, float, float]:
        """beta, gamma and eta (Definitions 15 to 17); eta only where both excesses are positive."""
        raw = self.thresholds == "raw"
        tau, kappa = (
            (metrics.tau, metrics.kappa) if raw else (metrics.tau_normalised, metrics.kappa_normalised)
        )
        excess = max(tau - self.tau_crit, 0.0) * max(kappa - self.kappa_crit, 0.0)
        return (
            self.beta0 / (metrics.tau + self.eps) if metrics.path_length > 0 else 0.0,
            self.gamma0 / (1 + metrics.kappa) if metrics.path_length > 0 else 0.0,
            min(self.eta0 * excess, self.eta_max),
        )

    def _escape(self, modes: _Modes, mean: Tensor, residual: Tensor, k_used: int) -> Tensor:
        if self.escape == "residual" and modes.length(residual) >= self.eps:
            return residual
        return modes.oriented_sum(mean, k_used, min(k_used + self.ell_orth, modes.rank))


@dataclass(frozen=True)
class _Modes:
    """The right singular vectors q_i = Vᵀb_i / σ_i of V, or of the centred HV, by their weights b_i.

    factor: (n, n) F with FᵀF = G, so ‖Vᵀw‖ = ‖Fw‖ without the cancellation of wᵀGw; values: (r,) singular
    values, descending, without those that are noise; weights: (n, r), the columns b_i; noise: the length
    below which a combination of velocities is rounding error.
    """

    factor: Tensor
    values: Tensor
    weights: Tensor
    noise: float
    centred: bool

    @classmethod
    def of(cls, gram: Tensor, center: bool, tolerance: float) -> _Modes:
        squares, vectors = torch.linalg.eigh(gram)
        factor = squares.clamp(min=0).sqrt()[:, None] * vectors.T
        # Measured against the largest mode of G, centred or not: the rounding error comes from there.
        noise = tolerance * math.sqrt(max(float(squares[-1]), 0.0))
        if center:
            squares, vectors = torch.linalg.eigh(_centred(gram))
        values = squares.clamp(min=0).sqrt().flip(0)
        rank = int((values > noise).sum())
        return cls(factor, values[:rank], vectors.flip(1)[:, :rank], noise, center)

    @property
    def rank(self) -> int:
        return len(self.values)

    def length(self, weights: Tensor) -> float:
        """‖Vᵀw‖."""
        return float(torch.linalg.vector_norm(self.factor @ weights))

    def cosines(self, weights: Tensor) -> Tensor:
        """⟨q_i, Vᵀw⟩ for each mode."""
        return (self.factor @ self.weights).T @ (self.factor @ weights) / self.values

    def project(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """Weights of the part of Vᵀw that lies in the modes start..stop."""
        scaled = self.cosines(weights)[start:stop] / self.values[start:stop]
        return self.weights[:, start:stop] @ scaled

    def outside(self, weights: Tensor, k: int) -> Tensor:
        """Weights of (I - P_k) Vᵀw; zero where nothing but rounding error would be left."""
        if not self.centred:
            return self.project(weights, k, self.rank)
        residual = weights - self.project(weights, 0, k)
        noise = self.noise / math.sqrt(len(weights))  # the most that a mode below the cut adds to V̄
        return residual if self.length(residual) > noise else torch.zeros_like(residual)

    def oriented_sum(self, towards: Tensor, start: int, stop: int) -> Tensor:
        """Weights of Σ σ_i q_i over the modes start..stop, each turned so that ⟨q_i, Vᵀw⟩ >= 0."""
        if start >= stop:
            return torch.zeros_like(towards)
        cosines = self.cosines(towards)[start:stop]
        chosen = self.weights[:, start:stop]
        # An undecided sign would be left to rounding: the largest entry decides there, which is repeatable.
        largest = chosen.gather(0, chosen.abs().argmax(dim=0, keepdim=True)).squeeze(0)
        undecided = cosines.abs() <= _SIGN_TOLERANCE * self.length(towards)
        signs = torch.where(torch.where(undecided, largest, cosines) < 0, -1.0, 1.0).double()
        return chosen @ signs


def mean_velocity_weights(num_velocities: int) -> Tensor:
    """w with V̄ = Vᵀw (Definition 3)."""
    return torch.full((num_velocities,), 1 / num_velocities, dtype=torch.float64)


def mean_acceleration_weights(num_velocities: int) -> Tensor:
    """w with Ā = Vᵀw (Definition 4, whose sum telescopes); zero for a single velocity, which has none."""
    weights = torch.zeros(num_velocities, dtype=torch.float64)
    if num_velocities > 1:
        weights[0], weights[-1] = -1 / (num_velocities - 1), 1 / (num_velocities - 1)
    return weights


def _centred(gram: Tensor) -> Tensor:
    rows = gram - gram.mean(dim=0)
    return rows - rows.mean(dim=1, keepdim=True)


def _all_finite(values: Tensor) -> bool:
    """Without the temporaries of `torch.isfinite`: both extremes are NaN where any value is."""
    return values.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


def _auto_dimension(values: Tensor) -> int:
    """Where to cut the singular values: at their widest gap, or else at the participation ratio."""
    if len(values) < 2:
        return len(values)
    ratios = values[:-1] / values[1:]
    if float(ratios.max()) >= _GAP_RATIO:
        return int(ratios.argmax()) + 1
    squares = values.square()
    return max(round(float(squares.sum() ** 2 / squares.square().sum())), 1)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")


def _whole_from(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(name: str, value: float, allowed: str, accepts: Callable[[Any], bool]) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or not accepts(value):
        raise ValueError(f"{name} is {value!r}, but must be {allowed}")
