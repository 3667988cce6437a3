"""How far a model that decodes token by token from its cache is from one pass over the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of, evaluating
from aiether.evaluation.conformance._trial import Worst
from aiether.evaluation.loss import products


@dataclass(frozen=True)
class Parity:
    """The largest difference between two logits that should be equal.

    Attributes
    ----------
    difference: absolute; 0 where decoding is bit-equal, around 1e-5 of `scale` for float32 rounding.
    scale: the largest logit, absolute.
    tokens: of the sequence.
    """

    difference: float
    scale: float
    tokens: int


def decode_parity(model: nn.Module, ids_T: Tensor, *, bf16: bool = False) -> Parity | None:
    """Compare logits from the cache, one token at a time, with those of one pass without a cache.

    Parameters
    ----------
    model: as for `check_conformance`. None is returned where it has no cache.
    ids_T: int64 (T,), a stretch of text.
    bf16: as for `sum_losses`; differences are then those of bfloat16.
    """
    forward, device = Forward(model), device_of(model)
    if not (forward.takes("past_key_values") and forward.takes("use_cache")):
        return None
    ids_BT, worst, cache = ids_T[None].to(device), Worst(), None
    with evaluating(model), products(device, bf16):
        whole = forward(ids_BT)[0]
        for place in range(len(ids_T)):
            step, cache = forward.cached(ids_BT[:, place : place + 1], cache)
            if cache is None:
                return None
            worst.see(whole[place : place + 1], step[0], lambda _: "")
    return Parity(worst.value, worst.scale, len(ids_T))
