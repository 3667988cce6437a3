"""Toroidal attention from fused attention: one call for all pairs of platters, which share keys and values.

Between platters k and l a query's score is linear in the whole key, so that only the query differs: (1 - g) q
+ g sqrt(D) (the query's platter k, put where the key's platter l lies). The distance on the ring is a few
further dimensions of queries and keys (see waves.py). So D^2 pairs are D^2 heads over the same keys and
values, N x N each, and the softmax over all platters is put together from theirs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .distance import cosine_weights, in_ring_window, platter_distance, ring_distance, shuffled_places
from .flex import attend_flex, flex_compiles, flex_takes
from .kernels import attend_cudnn, attend_eager, attend_flash, flash_width, merge, rows_of
from .rotary import turn_between
from .settings import ToroidalSettings
from .terms import Terms
from .waves import in_halves, waves_of

_FEWEST_PLANNED = 128
"""Queries below which cuDNN, which plans for each shape, is left alone: decoding always meets new ones."""
_WIDEST_PLANNED = 128
"""Dimensions of queries up to which cuDNN has gradients on all GPUs."""
_HAS_CUDNN = torch.backends.cudnn.is_available()  # to ask while torch.compile traces breaks its graph


@dataclass(frozen=True)
class Places:
    """Where tokens stand, and what may attend to what.

    Attributes
    ----------
    query, key: int64 (N,) and (M,), or (B, N) and (B, M) where rows begin at different places.
    allowed: bool, broadcast to (B, H, N, M); None: everything. Where `causal` it is that and causal.
    causal: query n sees keys 0 to n; N and M are equal.
    known_by: equal for equal `query` and `key`, so that what was made of them can be kept; None: not known.
    first: int64 (B, N), the place at which a query's document begins, from which its sinks are counted, where
        rows hold several documents. None: sinks are the keys at places below their number.
    bias: broadcast to (B, H, N, M), what a mask adds to scores; None: nothing.
    counted: as `key`, by which sinks are counted from `first`; None: by `key`.
    """

    query: Tensor
    key: Tensor
    allowed: Tensor | None = None
    causal: bool = True
    known_by: Hashable = None
    first: Tensor | None = None
    bias: Tensor | None = None
    counted: Tensor | None = None


def toroidal_attention(
    query_BHNX: Tensor,
    key_BGMX: Tensor,
    value_BGMX: Tensor,
    terms: Terms,
    settings: ToroidalSettings,
    places: Places,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """(B, H, N, D, X / D), before fusion; `reference_attention` is the same by definition.

    Args:
        key_BGMX, value_BGMX: G divides H; a key head serves H / G query heads in turn.
        scale: of the whole head's products, 1 / sqrt(X) as a rule.
        dropout: probability with which an attention weight is dropped; needs the eager path.
    """
    query_BHNX, key_BGMX, value_BGMX = as_autocast(query_BHNX, key_BGMX, value_BGMX)
    pairs_BPNX, lambda_BPN = pairs_of_platters(query_BHNX, terms, settings)
    output, log = attend_pairs(
        pairs_BPNX, key_BGMX, value_BGMX, lambda_BPN, settings, places, scale=scale, dropout=dropout
    )
    return union_of_platters(output, log, terms, settings.platters)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its type, which kernels called by name do not see; rotary tables leave float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(kind)) for each in tensors)


def attend_pairs(
    pairs_BPNX: Tensor,
    key_BGMX: Tensor,
    value_BGMX: Tensor,
    lambda_BPN: Tensor,
    settings: ToroidalSettings,
    places: Places,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What each platter sees in each among these keys, (B, H, D, D, N, X / D), and the log-sum-exp."""
    backend = choose_backend(settings, places, pairs_BPNX, dropout)
    if settings.shuffled:
        query, key = (
            shuffled_places(each, settings.period, settings.sinks) for each in (places.query, places.key)
        )
        places = replace(places, query=query, key=key, counted=places.key)
    if backend == "flash":
        pairs_BPNX, key_BGMX = _with_waves(
            pairs_BPNX, key_BGMX, value_BGMX.shape[-1], lambda_BPN, settings, places, scale
        )
        found = attend_flash(pairs_BPNX, key_BGMX, value_BGMX, causal=places.causal, scale=scale)
    elif backend == "cudnn":
        heads = pairs_BPNX.shape[1] // settings.platters**2
        pairs_BPNX, key_BGMX = _with_waves(pairs_BPNX, key_BGMX, 0, lambda_BPN, settings, places, scale)
        values = _platters_of_values(value_BGMX, heads, settings.platters)
        output, log = attend_cudnn(pairs_BPNX, key_BGMX, values, causal=places.causal, scale=scale)
        return _in_order(output, settings.platters), _in_order(log, settings.platters)
    elif backend == "flex":
        found = attend_flex(pairs_BPNX, key_BGMX, value_BGMX, lambda_BPN, settings, places, scale=scale)
    else:
        found = _eager(pairs_BPNX, key_BGMX, value_BGMX, lambda_BPN, settings, places, scale, dropout)
    return _seen_platters(*found, settings.platters)


def _seen_platters(output_BPNX: Tensor, log_BPN: Tensor, platters: int) -> tuple[Tensor, Tensor]:
    """Of the values that a pair (k, l) of platters saw those of platter l, as a view."""
    output = _in_order(output_BPNX, platters).unflatten(-1, (platters, -1))
    return output.diagonal(dim1=3, dim2=5).movedim(-1, 3), _in_order(log_BPN, platters)


def _in_order(pairs_BPN: Tensor, platters: int) -> Tensor:
    """(B, H D D, N, ...) -> (B, H, D, D, N, ...), a query's platter before a key's."""
    return pairs_BPN.unflatten(1, (-1, platters, platters)).transpose(2, 3)


def _platters_of_values(value_BGMX: Tensor, heads: int, platters: int) -> Tensor:
    """(B, H D, M, X / D): each is what the D pairs see that have its platter of keys."""
    slots = value_BGMX.unflatten(-1, (platters, -1)).movedim(3, 2)
    return slots.repeat_interleave(heads // value_BGMX.shape[1], dim=1).flatten(1, 2)


def choose_backend(settings: ToroidalSettings, places: Places, query_BHNX: Tensor, dropout: float) -> str:
    """The path that computes this: the fused one where it can.

    Raises
    ------
    ValueError
        If the settings ask for one that cannot.
    """
    plain = settings.window is None and settings.distance != "triangle"
    masked = places.allowed is not None or places.first is not None or places.bias is not None
    one_block = not masked and dropout == 0
    flash = plain and one_block and flash_takes(query_BHNX)
    able = {
        "flash": flash,
        "flex": one_block and flex_takes(query_BHNX),
        "eager": True,
        "cudnn": plain and one_block and cudnn_takes(query_BHNX, settings),  # last: where it is asked for
    }
    if not able.get(settings.backend, True) and one_block:
        raise ValueError(
            f"backend={settings.backend!r} cannot compute this on {query_BHNX.device.type} in "
            f"{query_BHNX.dtype} with {query_BHNX.shape[-1]} dimensions (on CUDA flash and cudnn take half "
            "precision, and cudnn heads of 119 dimensions at most, 101 with harmonics): leave it at 'auto', "
            "or set it so by aiether.toroidal.set_backend"
        )
    wanted = able if settings.backend == "auto" else (settings.backend, "eager")
    backend = next(name for name in wanted if able[name])
    if backend == "cudnn" and query_BHNX.shape[2] < _FEWEST_PLANNED:
        return "flash"
    if backend == "flex" and not flex_compiles(query_BHNX, len(places.key), settings, places.causal):
        return "eager"
    return backend


def flash_takes(query_BHNX: Tensor) -> bool:
    """Whether the fused kernel takes queries of this device, type and size."""
    if query_BHNX.device.type == "cuda":
        half = query_BHNX.dtype in (torch.float16, torch.bfloat16)
        return (
            half
            and query_BHNX.shape[-1] <= 224
            and torch.cuda.get_device_capability(query_BHNX.device) >= (8, 0)
        )
    return query_BHNX.device.type == "cpu"


def cudnn_takes(query_BHNX: Tensor, settings: ToroidalSettings) -> bool:
    """Whether cuDNN's kernels take queries of this device, type and size with the distance beside them."""
    waves = 2 * len(cosine_weights(settings.distance)) + 1  # cosines, sines and the sinks, each in halves
    narrow = query_BHNX.shape[-1] + 3 * waves <= _WIDEST_PLANNED
    there = query_BHNX.device.type == "cuda" and torch.version.hip is None
    return there and narrow and flash_takes(query_BHNX) and _HAS_CUDNN


def pairs_of_platters(query_BHNX: Tensor, terms: Terms, settings: ToroidalSettings) -> tuple[Tensor, Tensor]:
    """Queries as each pair of platters has them, (B, P = H D D, N, X), and lambda.

    Of a head's pairs the D that have the key's first platter come first. Lambda is float32, (B or 1, P, N).
    """
    lambda_BHN = terms.lambda_BHN.expand(-1, query_BHNX.shape[1], query_BHNX.shape[2])
    if settings.platters == 1:
        return query_BHNX, lambda_BHN  # (1 - g) s + g s
    lambda_BPN = lambda_BHN.repeat_interleave(settings.platters**2, dim=1)
    return _Pairs.apply(query_BHNX, terms.gate, settings), lambda_BPN  # type: ignore[return-value]


class _Pairs(torch.autograd.Function):
    """(1 - g) q + g sqrt(D) (the platter k of q, where l lies), for all pairs written into one tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query_BHNX: Tensor, gate: Tensor, settings: ToroidalSettings) -> Tensor:
        platters, turns = settings.platters, settings.platter_rotary
        gate = gate.to(query_BHNX.dtype)
        batch, heads, length, width = query_BHNX.shape
        pairs = query_BHNX.new_empty(batch, heads, platters, platters, length, width)
        pairs.copy_(((1 - gate) * query_BHNX)[:, :, None, None])
        own = (gate * math.sqrt(platters) * query_BHNX).unflatten(-1, (platters, -1))
        slots = pairs.unflatten(-1, (platters, -1))
        for k, other in product(range(platters), repeat=2):
            asked = own[..., k, :]
            slots[:, :, other, k, :, other] += turn_between(asked, k, other, platters) if turns else asked
        return pairs.flatten(1, 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        query_BHNX, gate, ctx.settings = inputs
        learned = getattr(gate, "requires_grad", False)
        ctx.save_for_backward(gate, query_BHNX if learned else None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        platters, turns = ctx.settings.platters, ctx.settings.platter_rotary
        gate, query_BHNX = ctx.saved_tensors
        pairs = grad_outputs[0].unflatten(1, (-1, platters, platters))
        whole = pairs.sum((2, 3))
        slots = pairs.unflatten(-1, (platters, -1))
        own = []
        for k in range(platters):
            asked = [slots[:, :, other, k, :, other] for other in range(platters)]
            if turns:
                asked = [turn_between(each, other, k, platters) for other, each in enumerate(asked)]
            own.append(sum(asked[1:], asked[0]))
        own = math.sqrt(platters) * torch.cat(own, -1)
        grad_gate = None
        if query_BHNX is not None and ctx.needs_input_grad[1]:
            grad_gate = ((own - whole) * query_BHNX).sum(dtype=torch.float32).to(gate.dtype)
        share = gate.to(whole.dtype)
        return torch.lerp(whole, own, share), grad_gate, None


def _with_waves(
    pairs_BPNX: Tensor,
    key_BGMX: Tensor,
    value_size: int,
    lambda_BPN: Tensor,
    settings: ToroidalSettings,
    places: Places,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys with the distance as further dimensions, in the width that the kernel takes."""
    asked, told = waves_of(settings, places, scale, key_BGMX.dtype)
    asked = in_halves(asked[:, None] * lambda_BPN[..., None], key_BGMX.dtype, (0, 0, 1))
    width = flash_width(pairs_BPNX.shape[-1] + told.shape[-1], value_size)

    def extended(tensor: Tensor, waves: Tensor) -> Tensor:
        none = tensor.new_zeros(()).expand(*tensor.shape[:-1], width - tensor.shape[-1] - waves.shape[-1])
        return torch.cat([tensor, waves.expand(*tensor.shape[:-1], -1), none], -1)

    return extended(pairs_BPNX, asked), extended(key_BGMX, told[:, None])


def _eager(
    pairs_BPNX: Tensor,
    key_BGMX: Tensor,
    value_BGMX: Tensor,
    lambda_BPN: Tensor,
    settings: ToroidalSettings,
    places: Places,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Any mask, any distance; the masks and biases of a block of queries at a time."""
    shared = pairs_BPNX.shape[1] // key_BGMX.shape[1]
    keys, values = (each.repeat_interleave(shared, dim=1) for each in (key_BGMX, value_BGMX))
    query_places, key_places = (each if each.ndim == 2 else each[None] for each in (places.query, places.key))
    counted = key_places if places.counted is None else places.counted
    order = torch.arange(key_BGMX.shape[2], device=key_BGMX.device)

    def for_pairs(of_heads: Tensor) -> Tensor:
        """A mask for all heads alike, or each head's for all its pairs."""
        heads = of_heads.shape[1] if of_heads.ndim == 4 else 1
        return of_heads if heads == 1 else of_heads.repeat_interleave(pairs_BPNX.shape[1] // heads, dim=1)

    def steps_of(first: int, last: int) -> Tensor:
        return query_places[:, first:last, None] - key_places[:, None]

    def sink_of(first: int, last: int) -> Tensor:  # (B, 1 or queries, M)
        if places.first is None:
            return (key_places < settings.sinks)[:, None]
        return counted[:, None] - places.first[:, first:last, None] < settings.sinks

    def allowed(first: int, last: int) -> Tensor:
        seen = (order <= order[first:last, None]) if places.causal else torch.ones_like(order) > 0
        if places.allowed is not None:
            seen = seen & for_pairs(rows_of(places.allowed, first, last))
        if settings.window is not None:
            near = in_ring_window(steps_of(first, last), settings.period, settings.window)
            seen = seen & (near | sink_of(first, last))[:, None]
        return seen

    def bias(first: int, last: int) -> Tensor:
        steps = steps_of(first, last)
        far = ring_distance(steps, settings.period, settings.distance)
        far = far.masked_fill(sink_of(first, last), 0)
        taken = -lambda_BPN[:, :, first:last, None] * far[:, None]
        return taken if places.bias is None else taken + for_pairs(rows_of(places.bias, first, last))

    return attend_eager(pairs_BPNX, keys, values, allowed=allowed, bias=bias, scale=scale, dropout=dropout)


def union_of_platters(output_BHDDNY: Tensor, log_BHDDN: Tensor, terms: Terms, platters: int) -> Tensor:
    """Each platter's softmax over the keys of all platters, (B, H, N, D, Y), Y = X / D."""
    if platters == 1:
        return output_BHDDNY[:, :, 0].transpose(2, 3)
    apart = platter_distance(platters, log_BHDDN.device)[None, None, :, :, None]
    crossing = ~torch.eye(platters, dtype=torch.bool, device=log_BHDDN.device)[..., None]
    cross = torch.where(crossing, terms.cross_H.float()[:, None, None, None], 0)
    logs = log_BHDDN.float() - terms.lambda_BHN.float()[:, :, None, None] * apart + cross
    merged, _ = merge(output_BHDDNY, logs)
    return merged.movedim(2, 3)
