"""Held-out loss in units that compare across tokenizers."""

from __future__ import annotations

import math


def perplexity(loss_nats: float) -> float:
    """exp of the mean loss per token; infinite where that leaves the range of a float."""
    try:
        return math.exp(loss_nats)
    except OverflowError:
        return math.inf


def bits_per_byte(loss_nats: float, tokens: float, nbytes: float) -> float:
    """Bits the model needs for one byte of text: loss * tokens / (ln 2 * bytes).

    Args:
        loss_nats: mean loss per token, in nats.
        tokens: tokens of the text; only the quotient to `nbytes` counts.
        nbytes: UTF-8 bytes of the same text.

    Raises ValueError unless both counts are positive.
    """
    if tokens <= 0 or nbytes <= 0:
        raise ValueError(f"bits per byte of {tokens} tokens and {nbytes} bytes; both must be above 0")
    return loss_nats * tokens / (math.log(2.0) * nbytes)
