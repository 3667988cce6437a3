"""Exact attention over a sequence that is sharded over ranks: keys and values travel from rank to rank.

Each rank attends from its own queries to the keys that it has at the moment, while these are on their way to
the next rank, and merges what it found by the log-sum-exps. For the gradients keys and values go round again,
and the gradients of each along with them. A rank has a few shards of keys at a time, however many ranks
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import Places, as_autocast, attend_pairs, flash_takes, pairs_of_platters, union_of_platters
from .kernels import attend_eager, attend_flash, merge
from .settings import ToroidalSettings
from .shards import SequenceShards
from .terms import Terms

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Places], tuple[Tensor, Tensor]]
"""(queries, keys, values, lambda, places) -> (output, log-sum-exp)."""
_KEYS, _GRADIENTS = 0, 1
"""Tags of the messages, which two ranks exchange at the same time."""


def ring_attention(
    query_BHNX: Tensor,
    key_BGNX: Tensor,
    value_BGNX: Tensor,
    shards: SequenceShards,
    *,
    causal: bool = True,
    scale: float,
) -> Tensor:
    """Plain attention of this rank's queries to the keys of all ranks, (B, H, N, X), N the tokens of a rank.

    All ranks of the group call it, and its backward, in the same order.

    Args:
        key_BGNX, value_BGNX: this rank's; G divides H.

    Raises
    ------
    ValueError
        If the tokens are not a rank's share of the sequence.
    """
    attend = partial(_attend_plain, scale=scale)
    query_BHNX, key_BGNX, value_BGNX = as_autocast(query_BHNX, key_BGNX, value_BGNX)
    output, _ = _go_round(query_BHNX, key_BGNX, value_BGNX, None, attend, shards, causal)
    return output


def toroidal_ring_attention(
    query_BHNX: Tensor,
    key_BGNX: Tensor,
    value_BGNX: Tensor,
    terms: Terms,
    settings: ToroidalSettings,
    shards: SequenceShards,
    *,
    causal: bool = True,
    scale: float,
) -> Tensor:
    """`toroidal_attention` of this rank's queries to the keys of all ranks, (B, H, N, D, X / D).

    Distances are those of the whole sequence. The union over ranks comes before that over platters; both are
    merges by the log-sum-exp. Arguments and errors as for `ring_attention`; `terms` are those of the queries.
    """

    def attend(pairs: Tensor, key: Tensor, value: Tensor, strength: Any, places: Places) -> Any:
        return attend_pairs(pairs, key, value, strength, settings, places, scale=scale)

    query_BHNX, key_BGNX, value_BGNX = as_autocast(query_BHNX, key_BGNX, value_BGNX)
    pairs_BPNX, lambda_BPN = pairs_of_platters(query_BHNX, terms, settings)
    output, log = _go_round(pairs_BPNX, key_BGNX, value_BGNX, lambda_BPN, attend, shards, causal)
    return union_of_platters(output, log, terms, settings.platters)


def _attend_plain(
    query: Tensor, key: Tensor, value: Tensor, strength: None, places: Places, *, scale: float
) -> tuple[Tensor, Tensor]:
    if flash_takes(query):
        return attend_flash(query, key, value, causal=places.causal, scale=scale)
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))

    def allowed(first: int, last: int) -> Tensor:
        return places.query[first:last, None] >= places.key

    return attend_eager(query, key, value, allowed=allowed if places.causal else None, scale=scale)


def _over_all_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor | None,
    attend: Attend,
    shards: SequenceShards,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    for given in (query, key, value):
        shards.check_share(given.shape[2])
    return _Ring.apply(query, key, value, strength, attend, shards, causal)  # type: ignore[no-any-return]


_go_round: Any = torch.compiler.disable(_over_all_ranks)


class _Ring(torch.autograd.Function):
    """Attention over all ranks' keys; for its gradient each block is computed anew, one at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        strength: Tensor | None,
        attend: Attend,
        shards: SequenceShards,
        causal: bool,
    ) -> Any:
        ctx.attend, ctx.shards, ctx.causal = attend, shards, causal
        ctx.autocast = _autocast(query.device.type)
        exact = torch.promote_types(query.dtype, torch.float32)
        output = log = torch.empty(0)
        for owner, held in _visits(_pack(key, value), shards):
            seen = _seen(shards, owner, causal, query.device)
            if seen is None:
                continue
            rows, columns, places = seen
            given = _block(query, *_unpack(held, key, value), strength, rows, columns)
            found, found_log = (each.to(exact).contiguous() for each in attend(*given, places))
            if owner == shards.rank:  # the first: all of this rank's queries see keys of their own
                output, log = found, found_log
                continue
            output[..., rows, :], log[..., rows] = merge(
                torch.stack([output[..., rows, :], found], -3), torch.stack([log[..., rows], found_log], -2)
            )
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, strength, output, log)
        return output, log

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, strength, output, log = ctx.saved_tensors
        shards, merged = ctx.shards, (output, log, *grad_outputs)
        exact = log.dtype
        query_grad = torch.zeros_like(query, dtype=exact)
        strength_grad = None if strength is None else torch.zeros_like(strength, dtype=exact)
        home: Callable[[], Tensor] | None = None
        for owner, held in _visits(_pack(key, value), shards):
            # of this owner's keys and values, packed as they are; they follow them on their way
            followers = torch.zeros_like(held, dtype=exact)
            seen = _seen(shards, owner, ctx.causal, query.device)
            if seen is not None:
                rows, columns, places = seen
                given = _block(query, *_unpack(held, key, value), strength, rows, columns)
                with ctx.autocast():
                    grads = _block_gradients(ctx.attend, given, places, _rows_of(merged, rows))
                query_grad[:, :, rows] += grads[0]
                for total, grad in zip(_unpack(followers, key, value), grads[1:3], strict=True):
                    total[:, :, columns] += grad
                if strength_grad is not None:
                    strength_grad[:, :, rows] += grads[3]
            if home is not None:
                followers += home()
            home = _pass_on(followers, shards, _GRADIENTS)
        assert home is not None
        key_grad, value_grad = _unpack(home(), key, value)
        return (
            query_grad.to(query.dtype),
            key_grad.to(key.dtype),
            value_grad.to(value.dtype),
            None if strength_grad is None else strength_grad.to(strength),
            None,
            None,
            None,
        )


def _rows_of(merged: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Of the output, its logarithm and the gradients of both."""
    output, log, grad_output, grad_log = merged
    return [output[..., rows, :], log[..., rows], grad_output[..., rows, :], grad_log[..., rows]]


def _block(
    query: Tensor, key: Tensor, value: Tensor, strength: Tensor | None, rows: slice, columns: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    part = None if strength is None else strength[:, :, rows]
    return query[:, :, rows], key[:, :, columns], value[:, :, columns], part


def _block_gradients(
    attend: Attend, given: tuple[Tensor, Tensor, Tensor, Tensor | None], places: Places, merged: list[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of a block's queries, keys, values and lambda.

    With the block's share w = exp(log_b - log) of the union, out = sum w_b out_b, so that d out_b = w_b d out
    and d log_b = w_b (d out . (out_b - out) + d log).
    """
    output, log, grad_output, grad_log = merged
    with torch.enable_grad():
        leaves = [None if each is None else each.detach().requires_grad_() for each in given]
        found, found_log = attend(*leaves, places)  # type: ignore[arg-type]
    with torch.no_grad():
        share = (found_log - log.masked_fill(log == -torch.inf, 0)).exp()
        apart = found.to(log.dtype) - output
        moved = (grad_output * apart).sum(-1) + grad_log
        grads = ((share[..., None] * grad_output).to(found.dtype), (share * moved).to(found_log.dtype))
    return torch.autograd.grad((found, found_log), [each for each in leaves if each is not None], grads)


def _seen(
    shards: SequenceShards, owner: int, causal: bool, device: torch.device
) -> tuple[slice, slice, Places] | None:
    """Which of this rank's queries see which of the owner's keys, all of them or causally; None: none do.

    In zigzag order rank i has chunks i and 2R - 1 - i: of an earlier rank's two, all of ours see the first
    and none the second; of a later rank's, our second chunk sees both and our first neither.
    """
    rows = columns = slice(None)
    half = shards.size // 2
    if causal and owner < shards.rank and shards.zigzag:
        columns = slice(half)
    elif causal and owner > shards.rank:
        if not shards.zigzag:
            return None
        rows = slice(half, None)
    own, theirs = shards.positions(device)[rows], shards.positions(device, owner)[columns]
    known_by = (shards.length, shards.ranks, shards.zigzag, shards.rank, owner)
    return rows, columns, Places(own, theirs, causal=causal and owner == shards.rank, known_by=known_by)


def _autocast(device_type: str) -> Callable[[], Any]:
    """What makes the present autocast hold again, in the backward, where it does not of itself."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return partial(torch.autocast, device_type, dtype=dtype, enabled=enabled)


def _pack(key: Tensor, value: Tensor) -> Tensor:
    """One message of both."""
    return torch.cat([key.flatten(), value.flatten()])


def _unpack(held: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a message, in the shapes of this rank's own."""
    first, second = held.split([key.numel(), value.numel()])
    return first.view(key.shape), second.view(value.shape)


def _visits(held: Tensor, shards: SequenceShards) -> Iterator[tuple[int, Tensor]]:
    """(rank, what it holds), this rank's first; the next is on its way while the caller computes."""
    for step in range(shards.ranks):
        last = step == shards.ranks - 1
        arrival = None if last else _pass_on(held, shards, _KEYS)
        yield (shards.rank - step) % shards.ranks, held
        if arrival is not None:
            held = arrival()


def _pass_on(message: Tensor, shards: SequenceShards, tag: int) -> Callable[[], Tensor]:
    """Send to the next rank and receive from the one before; call what is returned to have what arrived."""
    if shards.ranks == 1:
        return lambda: message
    arriving = torch.empty_like(message)
    after, before = (shards.rank + 1) % shards.ranks, (shards.rank - 1) % shards.ranks
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, message, group=shards.group, tag=tag, group_peer=after),
            dist.P2POp(dist.irecv, arriving, group=shards.group, tag=tag, group_peer=before),
        ]
    )

    def arrived() -> Tensor:
        nonlocal message
        for work in works:
            work.wait()
        del message  # it had to live until it was sent
        return arriving

    return arrived
