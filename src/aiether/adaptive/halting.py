"""When to stop iterating: the distribution of a token's exit, its prior, and the rule that acts on it.

Notation: N iterations; lambda_n is the probability to stop after iteration n given that it was reached
(PonderNet, Banino et al. 2021, arXiv:2107.05407). The last iteration takes what is left.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Prior = Literal["uniform", "geometric"]


def prior_probabilities(prior: Prior, num_iterations: int, rate: float = 0.2) -> Tensor:
    """The exit's prior, float32 (N,): uniform, or geometric of `rate` with the rest on the last.

    Raises
    ------
    ValueError
        For another prior, or a rate outside of (0, 1).
    """
    if prior not in get_args(Prior):
        raise ValueError(f"prior is {prior!r}: choose one of {', '.join(get_args(Prior))}")
    if not 0 < rate < 1:
        raise ValueError(f"the rate of the geometric prior is {rate}: it must be between 0 and 1")
    if prior == "uniform":
        return torch.full((num_iterations,), 1 / num_iterations)
    stops = torch.full((num_iterations,), rate)
    return exit_probabilities(stops)


def exit_probabilities(stops_N: Tensor) -> Tensor:
    """lambda_1 ... lambda_N, last dimension -> the distribution of the exit; the last lambda counts as 1."""
    go_on = 1 - stops_N[..., :-1]
    reached = torch.cat([torch.ones_like(stops_N[..., :1]), go_on.cumprod(-1)], dim=-1)
    last_one = torch.cat([stops_N[..., :-1], torch.ones_like(stops_N[..., :1])], dim=-1)
    return reached * last_one


def thinking_rows(prior: Prior, num_iterations: int, batch_size: int, rate: float = 0.2) -> list[int]:
    """How many rows of a training batch run each iteration: all of them the first half, then fewer.

    Few tokens get far where exits are sampled, and what is computed beyond a token's exit is lost. So some
    rows end after half of the iterations: of the share of tokens that the prior sends on, the 3/4th power is
    the share of rows. That leaves each row tokens of different exits, as there are outside training, and room
    for a model that thinks longer than the prior. Two sizes only: compiled code has kernels for each.
    """
    whole = -(-num_iterations // 2)
    # Of plain numbers: a tensor's `item` would break the graph that is compiled of the loop.
    sent_on = (num_iterations - whole) / num_iterations if prior == "uniform" else (1 - rate) ** whole
    some = math.ceil(round(batch_size * sent_on**0.75, 6))
    return [batch_size] * whole + [some] * (num_iterations - whole)


def conditional_stops(probabilities_N: Tensor) -> Tensor:
    """The inverse of `exit_probabilities`: lambda_n = p_n / (p_n + ... + p_N)."""
    left = probabilities_N.flip(-1).cumsum(-1).flip(-1)
    return probabilities_N / left.clamp_min(torch.finfo(probabilities_N.dtype).tiny)


def bernoulli_kl(stop_logit: Tensor, prior_stop: Tensor | float) -> Tensor:
    """KL(Bernoulli(sigmoid(logit)) || Bernoulli(prior)) in nats, finite for every logit."""
    log_stop, log_go = torch.nn.functional.logsigmoid(stop_logit), torch.nn.functional.logsigmoid(-stop_logit)
    prior_stop = torch.as_tensor(prior_stop, dtype=stop_logit.dtype, device=stop_logit.device)
    stop = log_stop.exp()
    return stop * (log_stop - prior_stop.log()) + (1 - stop) * (log_go - torch.log1p(-prior_stop))
