"""The reference's documented `GeometricExtrapolator`, a door to `aiether.geometry`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from aiether.geometry import Extrapolator, GeometryMetrics, metrics_from_gram, velocity_gram

History: TypeAlias = Sequence[Tensor | np.ndarray] | Tensor | np.ndarray

__all__ = ["GeometricExtrapolator"]


class GeometricExtrapolator:
    """Adaptive geometric extrapolation under the names of the reference's README.

    Args:
        beta0, gamma0, eta0: base gains of velocity, acceleration and escape.
        k_subspace: dimension of the dynamic subspace, or "auto".
        ell_orth: how many secondary modes make the escape direction.
        tau_crit, kappa_crit: thresholds above both of which the escape term acts.
        options: the other fields of `aiether.geometry.Extrapolator`.

    Every default is the technical report's (Table 1). A history `W_history` is a list of S tensors or arrays
    of one shape, oldest first, or one tensor or array (S, ...) of them stacked.
    """

    def __init__(
        self,
        beta0: float = 0.1,
        gamma0: float = 0.15,
        eta0: float = 0.03,
        k_subspace: int = 10,
        ell_orth: int = 5,
        tau_crit: float = 2.0,
        kappa_crit: float = 0.5,
        **options: Any,
    ) -> None:
        self.extrapolator = Extrapolator(
            beta0=beta0,
            gamma0=gamma0,
            eta0=eta0,
            k_subspace=k_subspace,
            ell_orth=ell_orth,
            tau_crit=tau_crit,
            kappa_crit=kappa_crit,
            **options,
        )

    def compute_tau(self, W_history: History) -> float:
        """Temporal stretch factor (Definition 5)."""
        return self._metrics(W_history).tau

    def compute_kappa_eff(self, W_history: History) -> float:
        """Effective curvature (Definition 7)."""
        return self._metrics(W_history).kappa

    def extrapolate(self, W_history: History) -> tuple[Any, dict[str, Any]]:
        """W_new (Definition 18), of the kind, shape and dtype of the last snapshot, and its metrics."""
        snapshots = _snapshots(W_history)
        result, metrics = self.extrapolator.extrapolate(snapshots)
        return (result.numpy() if isinstance(snapshots[-1], np.ndarray) else result), metrics

    def _metrics(self, W_history: History) -> GeometryMetrics:
        return metrics_from_gram(velocity_gram(_snapshots(W_history)), self.extrapolator.eps)


def _snapshots(history: History) -> list[Tensor | np.ndarray]:
    # Iterating over a NumPy array of scalars gives NumPy numbers, which are no arrays.
    return [item if isinstance(item, Tensor) else np.asarray(item) for item in history]
