"""Two models over the same windows: both losses, their difference with its error, and their divergence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of, evaluating
from aiether.evaluation.loss import Counted, LossAdder, LossSums, batches, products, token_losses


@dataclass(frozen=True)
class Comparison:
    """A model beside its base, token by token.

    Attributes
    ----------
    model, base: the losses of each.
    divergences: the same sums of D(base || model), in nats, at every token that counts: what predictions of
        the model cost beyond the base's own entropy where tokens are drawn from the base. Not symmetric.
    """

    model: LossSums
    base: LossSums
    divergences: LossSums

    @property
    def kl(self) -> float:
        """Mean of the divergence per token, in nats."""
        return self.divergences.loss

    @property
    def difference(self) -> float:
        """The model's loss less the base's, in nats per token: above 0 the model is worse."""
        return self.model.loss - self.base.loss

    @property
    def standard_error(self) -> float | None:
        """Of the difference, paired over windows, which weigh by their tokens; None for a single window.

        With D_w the summed difference and n_w the tokens of a window and d = sum D / sum n, it is
        sqrt(W / (W - 1) * sum (D_w - d n_w)^2) / sum n. Neighbouring windows of one text are taken to be
        independent; the error is that of other texts, not of other training seeds.
        """
        count = self.model.windows
        if count < 2:
            return None
        differences = self.model.window_losses - self.base.window_losses
        residuals = differences - self.difference * self.model.window_counts
        return math.sqrt(count / (count - 1) * float(residuals.square().sum())) / self.model.tokens


def compare(
    model: nn.Module, base: nn.Module, windows: Iterable[Counted], *, batch_size: int = 8, bf16: bool = False
) -> Comparison:
    """Run windows through a model and its base, as `sum_losses` does.

    Log-softmax in float32, sums in float64.

    Raises
    ------
    ValueError
        For no window, for NaN, and for vocabularies of different sizes.
    """
    forwards = [(Forward(each), device_of(each)) for each in (model, base)]
    here = forwards[0][1]
    adders = LossAdder("loss"), LossAdder("base's loss"), LossAdder("divergence from its base")
    with evaluating(model), evaluating(base), products(here, bf16):
        for ids_BT, counted_BT in batches(windows, batch_size):
            ids = ids_BT.to(here)
            logits, base_logits = (forward(ids.to(device)).to(here) for forward, device in forwards)
            if logits.shape != base_logits.shape:
                raise ValueError(
                    f"the model predicts {logits.shape[-1]} entries and its base {base_logits.shape[-1]}: "
                    "between different vocabularies there is no divergence; compare bits per byte instead"
                )
            rows = [_divergences(*pair) for pair in zip(base_logits, logits, strict=True)]
            found = (
                token_losses(logits, ids),
                token_losses(base_logits, ids),
                F.pad(torch.stack(rows), (1, 0)),
            )
            for adder, losses_BT in zip(adders, found, strict=True):
                adder.add(losses_BT, counted_BT)
    return Comparison(*(adder.sums() for adder in adders))


def _divergences(base_TV: Tensor, model_TV: Tensor) -> Tensor:
    """D(base || model) of each prediction: float64 (T - 1,), on the CPU."""
    return token_divergences(base_TV[:-1], model_TV[:-1]).cpu().double()


def token_divergences(base_TV: Tensor, model_TV: Tensor) -> Tensor:
    """D(base || model) of distributions by their logits (..., V), in nats: float32 (...)."""
    base, other = (logits.float().log_softmax(-1) for logits in (base_TV, model_TV))
    parts = base.exp() * (base - other)
    # An entry that the base has masked adds 0 * (-inf), which would be NaN.
    return parts.masked_fill(base.isneginf(), 0.0).sum(-1)
