"""With which optimizer state a new tensor starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .config import Moments

ParameterMoments = dict[str, Tensor | float | int]

NOT_FROM_ZERO = frozenset({"mu_product", "mu", "eta", "step_size", "sum", "z"})
"""Entries that are not zero before an optimizer's first step: NAdam's, ASGD's, Rprop's and Adagrad's, and the
averaged weights of schedule-free optimizers."""


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

    `zero` gives zeros, or no entries at all where one of them does not start at zero: the optimizer then
    begins as it does with any tensor that it has not seen. `copy` gives copies, `reset` nothing. `zeros` and
    `copy` make the tensors.
    """
    if moments == "copy":
        return {key: copy(value) if isinstance(value, Tensor) else value for key, value in source.items()}
    if moments == "reset" or source.keys() & NOT_FROM_ZERO:
        return {}
    return {
        key: zeros(value) if isinstance(value, Tensor) else type(value)(0) for key, value in source.items()
    }
