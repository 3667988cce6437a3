"""FlexAttention: the exact triangle and the window on the ring, fused, on CUDA."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .settings import ToroidalSettings

if TYPE_CHECKING:
    from .attention import Places


def attend_flex(
    pairs_BPNX: Tensor,
    key_BGMX: Tensor,
    value_BGMX: Tensor,
    lambda_BPN: Tensor,
    settings: ToroidalSettings,
    places: Places,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(B, P, N, X) and the log-sum-exp, float32 (B, P, N). Lambda learns through its scores."""
    query_places, key_places = places.query, places.key
    assert query_places.ndim == 1
    triangle = settings.distance == "triangle"
    period, sinks, window, causal = settings.period, settings.sinks, settings.window, places.causal

    def wrapped(n: Tensor, m: Tensor) -> Tensor:
        steps = (query_places[n] - key_places[m]).remainder(period)
        return torch.minimum(steps, period - steps)

    def score(score: Tensor, b: Tensor, p: Tensor, n: Tensor, m: Tensor) -> Tensor:
        far = torch.where(key_places[m] < sinks, 0, wrapped(n, m) / period)
        return score - lambda_BPN[b, p, n] * far

    def seen(b: Tensor, p: Tensor, n: Tensor, m: Tensor) -> Tensor:
        inside = (n >= m) if causal else (n >= 0)
        if window is None:
            return inside
        return inside & ((wrapped(n, m) <= window) | (key_places[m] < sinks))

    lambda_BPN = lambda_BPN.expand(len(pairs_BPNX), -1, -1).contiguous()
    blocks = None
    if causal or window is not None:
        blocks = _block_mask(seen, query_places, key_places)
    return _compiled()(
        pairs_BPNX,
        key_BGMX,
        value_BGMX,
        score_mod=score if triangle else None,
        block_mask=blocks,
        scale=scale,
        enable_gqa=pairs_BPNX.shape[1] != key_BGMX.shape[1],
        return_lse=True,
    )


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(seen: Any, query_places: Tensor, key_places: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    size = (len(query_places), len(key_places))
    return create_block_mask(seen, None, None, *size, device=query_places.device.type)
