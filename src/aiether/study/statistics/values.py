"""What every test takes: a flat array of finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Values = Sequence[float] | np.ndarray


def as_values(values: Values, what: str = "values") -> np.ndarray:
    """The values as a float64 array of shape (n,).

    Raises ValueError where they are not flat, or where one is NaN or infinite: a run without a result is left
    out by whoever pairs the seeds, not by a test.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what} of shape {array.shape}; give one number for each seed, shape (n,)")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} {array.tolist()} hold NaN or infinity; leave seeds without a result out")
    return array


def check_share(value: float, name: str) -> None:
    """Raises ValueError unless 0 < value < 1."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
