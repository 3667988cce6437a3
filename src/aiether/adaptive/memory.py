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


class ProductKeyMemory(nn.Module):
    """(..., D) -> (..., D): what a token reads from learned slots, gated, to add to the residual stream.

    Queries and keys have unit length and one learned temperature a head. `values` is a table of slots, which
    wants a learning rate of its own.
    """

    usage: Tensor

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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial keys and temperatures (the linear parts and the table have their own), and no usage."""
        nn.init.normal_(self.keys, std=self.settings.key_size**-0.5)
        nn.init.constant_(self.log_temperature, _LOG_TEMPERATURE)
        nn.init.zeros_(self.usage)

    def forward(self, hidden: Tensor, present: Tensor | None = None) -> Tensor:
        """`present` (bool, without the last dimension): what is counted; None: everything."""
        normed = self.norm(hidden)
        flat = normed.flatten(0, -2)
        slots_MHK, weights_MHK = self.read(flat)
        if self.counting:
            self._count(slots_MHK, present)
        read = F.embedding_bag(
            slots_MHK.flatten(1),
            self.values.weight,
            mode="sum",
            per_sample_weights=weights_MHK.flatten(1).to(self.values.weight.dtype),
        )
        return self.output(F.silu(self.gate(normed)) * read.to(normed.dtype).view_as(normed))

    def read(self, normed_MD: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of each query, int64 (M, heads, top_k), and their softmax weights, float32."""
        settings, top = self.settings, self.settings.top_k
        queries = self.query(normed_MD).view(-1, settings.heads, 2, settings.key_size)
        with _full_precision(queries.device):  # autocast would take the scores in bfloat16
            queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(self.keys.float(), dim=-1)
            scores_MH2N = torch.einsum("mhpd,hpnd->mhpn", queries, keys)
            scores_MH2N = scores_MH2N * self.log_temperature.float().exp()[:, None, None]
        best, index = scores_MH2N.topk(top, dim=-1)
        pairs = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(-2)
        weights, chosen = pairs.topk(top, dim=-1)
        first = index[:, :, 0].gather(-1, chosen // top)
        second = index[:, :, 1].gather(-1, chosen % top)
        return first * settings.keys + second, weights.softmax(-1)

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
