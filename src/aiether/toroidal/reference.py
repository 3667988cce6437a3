"""Toroidal attention by its definition, one softmax over all tokens and platters: slow, and plainly right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .distance import in_ring_window, platter_distance, ring_distance, shuffled_places
from .rotary import turn_between
from .settings import ToroidalSettings
from .terms import Terms


def reference_attention(
    query_BHNX: Tensor,
    key_BHMX: Tensor,
    value_BHMX: Tensor,
    terms: Terms,
    settings: ToroidalSettings,
    *,
    query_places: Tensor,
    key_places: Tensor,
    allowed: Tensor,
    scale: float,
    first: Tensor | None = None,
) -> Tensor:
    """(B, H, N, D, X / D), before fusion.

    The score of query (i, k) and key (j, l) is (1 - g) s_ij + g sqrt(D) s_ij^kl - lambda (distance of i and j
    + distance of k and l) + beta where k != l. s is the whole head's scaled product, s^kl the platters', and
    no distance is taken from a sink.

    Args:
        query_places, key_places: int64, (N,) and (M,), or (B, N) and (B, M).
        allowed: bool, broadcast to (B, H, N, M): what a query may attend to.
        first: int64 (B, N), the place from which a query's sinks are counted; None: place 0.
    """
    platters = settings.platters
    size = query_BHNX.shape[-1] // platters
    sink_BNM = (key_places < settings.sinks)[..., None, :].expand(*query_places.shape, key_places.shape[-1])
    if first is not None:
        sink_BNM = key_places[..., None, :] - first[..., None] < settings.sinks
    if settings.shuffled:
        query_places, key_places = (
            shuffled_places(each, settings.period, settings.sinks) for each in (query_places, key_places)
        )
    steps_BNM = query_places[..., :, None] - key_places[..., None, :]
    far = ring_distance(steps_BNM, settings.period, settings.distance).to(query_BHNX.dtype)
    far = torch.where(sink_BNM, 0, far)
    if settings.window is not None:
        near = in_ring_window(steps_BNM, settings.period, settings.window) | sink_BNM
        allowed = allowed & (near[:, None] if near.ndim == 3 else near)
    far = far[:, None] if far.ndim == 3 else far
    whole = (query_BHNX @ key_BHMX.mT) * scale
    between = platter_distance(platters, query_BHNX.device).to(query_BHNX.dtype)
    scores = []
    for k in range(platters):
        row = []
        for other in range(platters):
            asked = query_BHNX[..., k * size : (k + 1) * size]
            if settings.platter_rotary:
                asked = turn_between(asked, k, other, platters)
            own = (asked @ key_BHMX[..., other * size : (other + 1) * size].mT) * (
                scale * math.sqrt(platters)
            )
            distance = terms.lambda_BHN[..., None] * (far + between[k, other])
            score = (1 - terms.gate) * whole + terms.gate * own - distance
            if other != k:
                score = score + terms.cross_H[None, :, None, None]
            row.append(score.masked_fill(~allowed, -math.inf))
        scores.append(torch.cat(row, dim=-1))
    weights = torch.softmax(torch.stack(scores, dim=3), dim=-1)
    values = torch.cat(value_BHMX.split(size, dim=-1), dim=2)
    return torch.einsum("bhnkm,bhmy->bhnky", weights.to(values.dtype), values)
