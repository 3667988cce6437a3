"""With which optimizer state a new tensor starts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .config import Moments

ParameterMoments = dict[str, Tensor | float | int]

STARTS_AT_ZERO = frozenset(
    {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "RMS",
        "momentum_buffer",
        "row_var",
        "col_var",
        "variance",
        "square_avg",
        "grad_avg",
        "acc_delta",
    }
)
"""Entries that are zero before an optimizer's first step: those of Adam and its kin, Muon, SGD, Adafactor,
RMSprop, Adadelta. Others start elsewhere (NAdam's `mu_product` at one)."""


def new_moments(source: Mapping[str, Tensor | float | int], moments: Moments) -> ParameterMoments:
    """The state of a new tensor whose source has the state `source`.

    `zero` gives zeros, or no entries at all where one of them does not start at zero: the optimizer then begins
    as it does with any tensor that it has not seen. `copy` gives copies, `reset` nothing.
    """
    if moments == "copy":
        return {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in source.items()
        }
    if moments == "reset" or not source.keys() <= STARTS_AT_ZERO:
        return {}
    return {
        key: torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)
        for key, value in source.items()
    }
