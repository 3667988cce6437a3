"""A small causal model written plainly, and the ways in which one goes wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, CONTEXT = 40, 16, 64
Fault = Literal[
    "none",
    "sees later tokens",
    "top-k over the sequence",
    "cache loses a token",
    "cache counts one too many",
    "padding moves positions",
    "padding is seen",
    "mean over the batch",
    "cache adds something",
    "parameter without use",
    "router behind a hard choice",
    "product with zero",
    "not a number",
]


class Model(nn.Module):
    """One attention and one routed layer over learned positions, with a cache of keys and values."""

    def __init__(self, fault: Fault = "none") -> None:
        super().__init__()
        self.fault = fault
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router, self.mlp = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        if fault in ("parameter without use", "product with zero"):
            self.idle = nn.Parameter(torch.ones(WIDTH))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        past = 0 if past_key_values is None else past_key_values[0].shape[1]
        x = self.embedding(input_ids) + self.position(self._positions(input_ids, position_ids, past))
        x, cache = self._attend(x, attention_mask, past_key_values, past)
        if self.fault == "mean over the batch":
            x = x - x.mean(0, keepdim=True)
        x = self._route(x)
        if self.fault == "product with zero":
            x = x + 0.0 * self.idle
        logits = self.head(x)
        if self.fault == "cache adds something" and use_cache:
            logits = logits + 1e-3
        if self.fault == "not a number":
            logits = logits.index_fill(2, torch.tensor([3]), torch.nan)
        return SimpleNamespace(logits=logits, past_key_values=cache if use_cache else None)

    def _positions(self, ids: Tensor, given: Tensor | None, past: int) -> Tensor:
        if given is None or self.fault == "padding moves positions":
            off = 1 if past and self.fault == "cache counts one too many" else 0
            return (torch.arange(ids.shape[1]) + past + off).expand(ids.shape)
        return given

    def _attend(
        self, x: Tensor, mask: Tensor | None, cache: Any, past: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = self.qkv(F.layer_norm(x, (WIDTH,))).chunk(3, dim=-1)
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=1), torch.cat([cache[1], value], dim=1)
        rows, columns = (
            torch.arange(query.shape[1]) + key.shape[1] - query.shape[1],
            torch.arange(key.shape[1]),
        )
        allowed = (columns <= rows[:, None])[None]
        if self.fault == "sees later tokens":
            allowed = torch.ones_like(allowed)
        if mask is not None and self.fault != "padding is seen":
            allowed = allowed & mask[:, None, -key.shape[1] :].bool()
        scores = query @ key.transpose(1, 2) / WIDTH**0.5
        weights = scores.masked_fill(~allowed, -1e9).softmax(-1)
        kept = (key[:, 1:], value[:, 1:]) if self.fault == "cache loses a token" else (key, value)
        return x + self.out(weights @ value), kept

    def _route(self, x: Tensor) -> Tensor:
        """Half of the tokens go through the MLP; which ones, each token decides for itself."""
        score = self.router(x)
        if self.fault == "top-k over the sequence":
            kth = score.topk(max(1, x.shape[1] // 4), dim=1).values[:, -1:]
            return x + (score >= kth) * score.sigmoid() * self.mlp(x)
        if self.fault == "router behind a hard choice":
            return x + (score > 0) * self.mlp(x)
        return x + (score > 0) * score.sigmoid() * self.mlp(x)
