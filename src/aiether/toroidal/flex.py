"""FlexAttention: any distance and the window on the ring, fused, on CUDA.

It is compiled for each shape: with shapes left open the gradient of lambda, which the scores are given from
outside, is not to be relied on. So that decoding does not compile a kernel for each length, few queries go
the eager path, which computes the same; so do further shapes once there are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .distance import cosine_weights
from .settings import ToroidalSettings

if TYPE_CHECKING:
    from .attention import Places

_FEWEST = 128
"""Queries below which nothing is compiled."""
_MOST_FORMS = 24
"""Forms that are compiled at most."""
_BLOCK = 128
"""Queries and keys of a block, in which masks are skipped or taken whole."""
_forms: set[Hashable] = set()

Modifier = Callable[..., Tensor]
"""f(..., batch, pair, query, key) -> Tensor, as FlexAttention calls it, with indices as tensors."""


def flex_takes(query_BHNX: Tensor) -> bool:
    """Whether there are kernels for queries of this device, type and size."""
    types = (torch.float16, torch.bfloat16, torch.float32)
    return (
        query_BHNX.device.type == "cuda" and query_BHNX.dtype in types and 16 <= query_BHNX.shape[-1] <= 256
    )


def flex_compiles(query_BPNX: Tensor, num_keys: int, settings: ToroidalSettings, causal: bool) -> bool:
    """Whether this form has been compiled, or may be: its queries are many, and forms few.

    Under a mode that watches operations, as a counter of FLOPs, nothing is compiled.
    """
    watched = not torch.compiler.is_compiling() and is_in_torch_dispatch_mode(include_infra_modes=False)
    if watched or query_BPNX.shape[2] < _FEWEST:
        return False
    graded = torch.is_grad_enabled(), query_BPNX.requires_grad
    kind = query_BPNX.device, query_BPNX.dtype, settings.distance, settings.period, settings.sinks
    form = (query_BPNX.shape, num_keys, settings.window, causal, *kind, *graded)
    if form not in _forms and len(_forms) < _MOST_FORMS:
        _forms.add(form)
    return form in _forms


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
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import AuxRequest

    sight = _sight(settings, places)
    blocks = None
    if places.causal or settings.window is not None:
        # what is known by nothing equals nothing, and would only fill the cache
        blocks = (_kept_block_mask if sight.known_by is not None else block_mask)(sight)
    # beyond the usual limit it would go on without a kernel, with all scores in memory
    with config.patch(recompile_limit=4 * _MOST_FORMS):
        output, found = _compiled()(
            pairs_BPNX,
            key_BGMX,
            value_BGMX,
            score_mod=_score(sight, lambda_BPN.expand(len(pairs_BPNX), -1, -1).contiguous(), settings),
            block_mask=blocks,
            scale=scale,
            enable_gqa=pairs_BPNX.shape[1] != key_BGMX.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return output, found.lse


@dataclass(frozen=True)
class Sight:
    """What sees what. Those that compare equal have equal tensors too, though others.

    Attributes
    ----------
    query_ring, key_ring: int32 (N,) and (M,), places on the ring, from 0 to `period`.
    sink: bool (M,).
    """

    known_by: Hashable
    num_queries: int
    num_keys: int
    causal: bool
    window: int | None
    period: int
    sinks: int
    shuffled: bool
    device: torch.device
    query_ring: Tensor = field(compare=False)
    key_ring: Tensor = field(compare=False)
    sink: Tensor = field(compare=False)


def _sight(settings: ToroidalSettings, places: Places) -> Sight:
    assert places.query.ndim == 1, "rows that begin at different places have a mask"
    return Sight(
        places.known_by,
        len(places.query),
        len(places.key),
        places.causal,
        settings.window,
        settings.period,
        settings.sinks,
        settings.shuffled,
        places.key.device,
        places.query.remainder(settings.period).int(),
        places.key.remainder(settings.period).int(),
        places.key < settings.sinks,
    )


def _wrapped(sight: Sight) -> Modifier:
    """Steps around the ring, the shorter way."""
    query_ring, key_ring, period = sight.query_ring, sight.key_ring, sight.period

    def wrapped(n: Tensor, m: Tensor) -> Tensor:
        steps = (query_ring[n] - key_ring[m]).abs()
        return torch.minimum(steps, period - steps)

    return wrapped


def _score(sight: Sight, lambda_BPN: Tensor, settings: ToroidalSettings) -> Modifier:
    wrapped, sink, period = _wrapped(sight), sight.sink, sight.period
    triangle = settings.distance == "triangle"
    weights = [] if triangle else cosine_weights(settings.distance)

    def score(score: Tensor, b: Tensor, p: Tensor, n: Tensor, m: Tensor) -> Tensor:
        around = wrapped(n, m) / period
        far = around
        if not triangle:
            far = torch.full_like(around, 0.25)
            for order, weight in weights:
                far = far - weight * torch.cos(2 * math.pi * order * around)
        return score - lambda_BPN[b, p, n] * torch.where(sink[m], 0.0, far)

    return score


def _seen(sight: Sight) -> Modifier:
    wrapped, sink, causal, window = _wrapped(sight), sight.sink, sight.causal, sight.window

    def seen(b: Any, p: Any, n: Tensor, m: Tensor) -> Tensor:
        inside = (n >= m) if causal else (n >= 0)
        if window is None:
            return inside
        return inside & ((wrapped(n, m) <= window) | sink[m])

    return seen


def block_mask(sight: Sight) -> Any:
    """FlexAttention's BlockMask, from a row of blocks at a time: never N x M at once."""
    from torch.nn.attention.flex_attention import BlockMask

    seen, keys = _seen(sight), torch.arange(sight.num_keys, device=sight.device)
    counts = []
    for first in range(0, sight.num_queries, _BLOCK):
        last = min(first + _BLOCK, sight.num_queries)
        rows = seen(None, None, torch.arange(first, last, device=sight.device)[:, None], keys[None])
        per_key = rows.expand(-1, sight.num_keys).sum(0)
        counts.append(F.pad(per_key, (0, -sight.num_keys % _BLOCK)).unflatten(0, (-1, _BLOCK)).sum(-1))
    seen_pairs = torch.stack(counts)[None, None]
    whole = seen_pairs == _BLOCK**2
    return BlockMask.from_kv_blocks(
        *_listed((seen_pairs > 0) & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(sight.num_queries, sight.num_keys),
    )


_kept_block_mask: Any = lru_cache(maxsize=16)(block_mask)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are meant, and the columns, these first, int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
