"""Product-key memory (Lample et al. 2019, arXiv:1907.05242; Berges et al. 2024, arXiv:2412.09764).

A slot's key is a pair of half keys, so that the best of n x n slots are found among n + n scores.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOG_TEMPERATURE = math.log(10.0)
_AS_PRODUCT = 4096
"""Compiled for CUDA, a table of at most so many slots is read as a matrix product: more arithmetic, far fewer
bytes than each token's own slots, forward and backward."""
_BY_MAXIMA = 1024
"""Entries times rounds up to which a search by maxima pays."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The shape of a memory.

    Attributes
    ----------
    keys: half keys n; there are n * n slots.
    heads: queries of a token.
    top_k: slots that each query reads.
    key_size: dimension of a half key.
    """

    keys: int = 32
    heads: int = 4
    top_k: int = 8
    key_size: int = 64

    def __post_init__(self) -> None:
        for name in ("keys", "heads", "top_k", "key_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory {name} is {getattr(self, name)}: it must be at least 1")
        if self.top_k > self.keys:
            raise ValueError(f"memory top_k is {self.top_k}, more than its {self.keys} half keys: take fewer")


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which the meta device (shapes alone) does not know."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _pairs(top_k: int) -> list[tuple[int, int]]:
    """The ranks of two halves that can make one of the best `top_k` pairs: those i * j <= top_k, from 1."""
    return [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]


def bag_read(slots_MHK: Tensor, weights_MHK: Tensor, values_SD: Tensor) -> Tensor:
    """(M, D), the weighted sum of the slots that each of M tokens reads, slot by slot."""
    weights = weights_MHK.flatten(1).to(values_SD.dtype)
    return F.embedding_bag(slots_MHK.flatten(1), values_SD, mode="sum", per_sample_weights=weights)


def product_read(slots_MHK: Tensor, weights_MHK: Tensor, values_SD: Tensor) -> Tensor:
    """The same as a matrix product with the whole table."""
    weights_MS = weights_MHK.new_zeros(len(slots_MHK), len(values_SD))
    weights_MS = weights_MS.scatter_add(-1, slots_MHK.flatten(1), weights_MHK.flatten(1))
    return weights_MS.to(values_SD.dtype) @ values_SD


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of the last dimension and where they are, highest first.

    Compiled for CUDA as k maxima one after another, which fuse into one kernel: torch.topk gives every row a
    block of threads, and the rows here have a few dozen entries (five times as long on an H100).
    """
    if not (scores.is_cuda and torch.compiler.is_compiling() and scores.shape[-1] * k <= _BY_MAXIMA):
        return scores.topk(k, dim=-1)  # type: ignore[return-value]
    index = indices_by_maxima(scores.detach(), k)
    return scores.gather(-1, index), index


def indices_by_maxima(scores: Tensor, k: int) -> Tensor:
    """Where the k highest are, highest first; of equal ones the first."""
    place, found = torch.arange(scores.shape[-1], device=scores.device), []
    for _ in range(k):
        found.append(scores.argmax(-1))
        scores = scores.masked_fill(place == found[-1][..., None], float("-inf"))
    return torch.stack(found, dim=-1)


class ProductKeyMemory(nn.Module):
    """(..., D) -> (..., D): what a token reads from learned slots, gated, to add to the residual stream.

    Queries and keys have unit length and one learned temperature a head. `values` is a table of slots, which
    wants a learning rate of its own.
    """

    usage: Tensor
    pairs: Tensor

    def __init__(self, hidden_size: int, settings: MemorySettings) -> None:
        super().__init__()
        self.settings = settings
        heads, keys, key_size = settings.heads, settings.keys, settings.key_size
        self.norm = nn.RMSNorm(hidden_size)
        self.query = nn.Linear(hidden_size, heads * 2 * key_size, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, keys, key_size))
        self.log_temperature = nn.Parameter(torch.empty(heads))
        self.values = nn.Embedding(keys * keys, hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.counting = False
        self.register_buffer("usage", torch.zeros(keys * keys, dtype=torch.long), persistent=False)
        num_pairs = len(_pairs(settings.top_k))
        self.register_buffer("pairs", torch.zeros(2, num_pairs, dtype=torch.long), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial keys and temperatures (the linear parts and the table have their own), and no usage."""
        nn.init.normal_(self.keys, std=self.settings.key_size**-0.5)
        nn.init.constant_(self.log_temperature, _LOG_TEMPERATURE)
        nn.init.zeros_(self.usage)
        with torch.no_grad():
            self.pairs.copy_(torch.tensor(_pairs(self.settings.top_k), device="cpu").T)

    def forward(self, hidden: Tensor, present: Tensor | None = None) -> Tensor:
        """`present` (bool, without the last dimension): what is counted; None: everything."""
        normed = self.norm(hidden)
        flat = normed.flatten(0, -2)
        slots_MHK, weights_MHK = self.read(flat)
        if self.counting:
            self._count(slots_MHK, present)
        as_product = hidden.is_cuda and torch.compiler.is_compiling()
        as_product = as_product and len(self.values.weight) <= _AS_PRODUCT
        read = (product_read if as_product else bag_read)(slots_MHK, weights_MHK, self.values.weight)
        return self.output(F.silu(self.gate(normed)) * read.to(normed.dtype).view_as(normed))

    def read(self, normed_MD: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of each query, int64 (M, heads, top_k), and their softmax weights, float32."""
        settings, top = self.settings, self.settings.top_k
        queries = self.query(normed_MD).view(-1, settings.heads, 2, settings.key_size)
        with _full_precision(queries.device):  # autocast would take the scores in bfloat16
            queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(self.keys.float(), dim=-1)
            scores_MH2N = torch.einsum("mhpd,hpnd->mhpn", queries, keys)
            scores_MH2N = scores_MH2N * self.log_temperature.float().exp()[:, None, None]
        best, index = best_of(scores_MH2N, top)
        slots = index[:, :, 0, self.pairs[0]] * settings.keys + index[:, :, 1, self.pairs[1]]
        pairs = best[:, :, 0, self.pairs[0]] + best[:, :, 1, self.pairs[1]]
        weights, chosen = best_of(pairs, top)
        return slots.gather(-1, chosen), weights.softmax(-1)

    def _count(self, slots_MHK: Tensor, present: Tensor | None) -> None:
        ones_MHK = torch.ones_like(slots_MHK)
        if present is not None:
            ones_MHK = ones_MHK * present.reshape(-1, 1, 1)
        self.usage.scatter_add_(0, slots_MHK.flatten(), ones_MHK.flatten())

    def reset_usage(self) -> None:
        """Begin to count anew."""
        self.usage.zero_()

    def usage_figures(self) -> dict[str, float]:
        """Of the reads so far: the share of slots read, and never read (dead), and the reads' entropy.

        The entropy is over that of even reads (1: all slots alike, 0: one slot).
        """
        share = self.usage.double() / self.usage.sum().clamp_min(1)
        entropy = -(share * share.clamp_min(1e-300).log()).sum().item()
        used = float((self.usage > 0).double().mean())
        even = math.log(len(self.usage)) or 1.0
        return {"memory_used": used, "memory_dead": 1 - used, "memory_entropy": entropy / even}
