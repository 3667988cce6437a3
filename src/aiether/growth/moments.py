"""With which optimizer state a new tensor starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .config import Moments

ParameterMoments = dict[str, Tensor | float | int]

FROM_ZERO = frozenset(
    (
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "row_var", "col_var", "variance"),
        *("exp_avg_sq_row", "exp_avg_sq_col", "RMS"),
    )
)
"""Entries that are zero before an optimizer's first step. Others may not be (NAdam's products, averaged or
slow weights, preconditioners, the code book of an 8-bit state): zeros there would spoil training silently."""


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def new_moments(
    source: Mapping[str, Tensor | float | int],
    moments: Moments,
    *,
    zeros: Callable[[Tensor], Tensor] = torch.zeros_like,
    copy: Callable[[Tensor], Tensor] = _clone,
) -> ParameterMoments:
    """The state of a new tensor whose source has the state `source`.

    `zero` gives zeros, or no entries at all where one of them is not known to start so: the optimizer then
    begins as it does with any tensor that it has not seen. `copy` gives copies, `reset` nothing. `zeros` and
    `copy` make the tensors.
    """
    if moments == "copy":
        return {key: copy(value) if isinstance(value, Tensor) else value for key, value in source.items()}
    if moments == "reset" or source.keys() - FROM_ZERO:
        return {}
    return {
        key: zeros(value) if isinstance(value, Tensor) else type(value)(0) for key, value in source.items()
    }
