"""Attention that also returns the log of its normaliser, with gradients through both.

With it attention over a union of key sets is put together from attention over each: the platters of a torus,
the blocks of a ring of devices. PyTorch's fused kernels return the logarithm, but let no gradient through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ALIGNED = 8
"""Fused kernels take heads of a multiple of so many dimensions."""
_NO_GRADIENT = range(193, 225)
"""Head sizes that flash kernels have no gradient for on consumer GPUs (compute capability 8.6, 8.9, 12)."""
QUERIES = 512
"""Queries that the eager path scores at once."""


def attend_eager(
    query_BHNX: Tensor,
    key_BHMX: Tensor,
    value_BHMY: Tensor,
    *,
    allowed: Tensor | Callable[[int, int], Tensor] | None = None,
    bias: Callable[[int, int], Tensor] | None = None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(B, H, N, Y) and the log-sum-exp of the scores, float32 (B, H, N).

    Queries are taken in blocks and recomputed for the gradient: memory grows with M, not with N x M.

    Args:
        allowed: bool, broadcast to (B, H, N, M), or f(first, last) -> the same of these queries; None:
            everything. A query that may attend to nothing gets 0 and a log-sum-exp of -inf.
        bias: f(first, last) -> what is added to the scores of these queries, broadcast to (B, H, queries, M).
        dropout: probability with which a weight is dropped.
    """
    outputs, logs = [], []
    for first in range(0, query_BHNX.shape[2], QUERIES):
        last = min(first + QUERIES, query_BHNX.shape[2])

        def block(query: Tensor, key: Tensor, value: Tensor, first: int = first, last: int = last) -> Any:
            scores = (query.float() @ key.float().mT) * scale
            if bias is not None:
                scores = scores + bias(first, last)
            if allowed is not None:
                rows = allowed(first, last) if callable(allowed) else rows_of(allowed, first, last)
                scores = scores.masked_fill(~rows, -math.inf)
            none = (scores == -math.inf).all(-1)
            scores = scores.masked_fill(none[..., None], 0)
            logs = scores.logsumexp(-1)
            weights = (scores - logs[..., None]).exp().masked_fill(none[..., None], 0)
            return F.dropout(weights, dropout).to(value.dtype) @ value, logs.masked_fill(none, -math.inf)

        given = (query_BHNX[:, :, first:last], key_BHMX, value_BHMY)
        blocked = query_BHNX.shape[2] > QUERIES and torch.is_grad_enabled()
        output, log = checkpoint(block, *given, use_reentrant=False) if blocked else block(*given)
        outputs.append(output)
        logs.append(log)
    return torch.cat(outputs, 2), torch.cat(logs, 2)


def rows_of(allowed: Tensor, first: int, last: int) -> Tensor:
    """A mask's rows for these queries; one that is alike for all has one row."""
    return allowed if allowed.shape[-2] == 1 else allowed[..., first:last, :]


def attend_flash(
    query_BHNX: Tensor, key_BGMX: Tensor, value_BGMY: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same from PyTorch's flash kernels, in memory that grows with N + M.

    Args:
        key_BGMX, value_BGMY: G divides H: each is shared by H / G heads in turn.
        causal: the first query sees the first key; N and M are equal then.
    """
    size = value_BGMY.shape[-1]
    width = flash_width(query_BHNX.shape[-1], size)
    padded = (_widened(each, width) for each in (query_BHNX, key_BGMX, value_BGMY))
    return _Fused.apply(*padded, size, causal, scale, "flash")  # type: ignore[return-value]


def attend_cudnn(
    query_BHNX: Tensor, key_BGMX: Tensor, value_BKMY: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same from cuDNN's kernels, on CUDA and in half precision alone.

    Values may be narrower than keys, and have another number of heads K that divides H; otherwise as
    `attend_flash`.
    """
    size = value_BKMY.shape[-1]
    query, key = (_widened(each, aligned(each.shape[-1])) for each in (query_BHNX, key_BGMX))
    value = _widened(value_BKMY, aligned(size + 1))
    return _Fused.apply(query, key, value, size, causal, scale, "cudnn")  # type: ignore[return-value]


def flash_width(query_size: int, value_size: int) -> int:
    """The size of heads that the kernel is given for queries and values of these sizes.

    One dimension of the values at least is left free.
    """
    width = max(query_size, value_size + 1)
    return aligned(_NO_GRADIENT.stop if width in _NO_GRADIENT else width)


def aligned(size: int) -> int:
    """The next size of heads that fused kernels take."""
    return size + -size % _ALIGNED


def _widened(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


class _Fused(torch.autograd.Function):
    """Fused attention whose log-sum-exp has a gradient.

    d lse / d s_j = p_j, so that the scores' gradient is p (dP - (delta - d lse)) with delta = sum(dO O). The
    kernels take delta from O and dO: in the free dimension, where all values are 0, dO is 1 and O is -d lse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: int,
        causal: bool,
        scale: float,
        engine: str,
    ) -> Any:
        ctx.size, ctx.causal, ctx.scale, ctx.engine = size, causal, scale, engine
        ctx.set_materialize_grads(False)
        if engine == "cudnn":
            output, log, *kept = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, causal, False, scale=scale
            )
        elif query.device.type == "cuda":
            output, log, *kept = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, causal, False, scale=scale
            )
        else:
            shared = query.shape[1] // key.shape[1]
            output, log, *kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, _for_heads(key, shared), _for_heads(value, shared), 0.0, causal, scale=scale
            )
        ctx.rest, ctx.state = kept[:4], kept[4:6]  # of CUDA: lengths, the random state
        ctx.save_for_backward(query, key, value, output, log)
        return output[..., :size], log.reshape(query.shape[:3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given, grad_log = grad_outputs
        query, key, value, output, log = ctx.saved_tensors
        grad_output = torch.empty_like(output)
        grad_output[..., : ctx.size] = 0 if given is None else given
        grad_output[..., ctx.size :] = 0
        if grad_log is not None:  # nobody asks for it where there is one set of keys
            grad_output[..., -1] = 1
            output = output.clone()
            output[..., -1] = -grad_log
        if ctx.engine == "cudnn":
            grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                grad_output, query, key, value, output, log, *ctx.state, None, *ctx.rest, 0.0, ctx.causal,
                scale=ctx.scale,
            )  # fmt: skip
        elif query.device.type == "cuda":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad_output, query, key, value, output, log, *ctx.rest, 0.0, ctx.causal, *ctx.state,
                scale=ctx.scale,
            )  # fmt: skip
        else:
            shared = query.shape[1] // key.shape[1]
            keys, values = _for_heads(key, shared), _for_heads(value, shared)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output, query, keys, values, output, log, 0.0, ctx.causal, scale=ctx.scale
            )
            grads = (grads[0], *(_of_heads(each, shared) for each in grads[1:]))
        return *grads, None, None, None, None


def _for_heads(shared_BGMX: Tensor, times: int) -> Tensor:
    return shared_BGMX if times == 1 else shared_BGMX.repeat_interleave(times, dim=1)


def _of_heads(heads_BHMX: Tensor, times: int) -> Tensor:
    return heads_BHMX if times == 1 else heads_BHMX.unflatten(1, (-1, times)).sum(2)


def merge(outputs: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a union: outputs (..., S, N, Y) and log-sum-exps (..., S, N) of S key sets -> without S.

    Where no set had a key for a query, its output is 0 and its logarithm -inf.
    """
    none = (logs == -math.inf).all(-2)  # log-sum-exp of nothing has no gradient, but NaN
    logs = logs.masked_fill(none[..., None, :], 0)
    whole = logs.logsumexp(-2)
    share = (logs - whole[..., None, :]).exp().masked_fill(none[..., None, :], 0)
    merged = (share[..., None].to(outputs.dtype) * outputs).sum(-3)
    return merged, whole.masked_fill(none, -math.inf)
