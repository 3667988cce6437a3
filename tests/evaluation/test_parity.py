from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE
from torch import Tensor, nn

from aiether.evaluation import decode_parity, watch_peak

IDS = torch.arange(12) % 7


class Counting(nn.Module):
    """Logits are running sums of one-hot tokens, kept in a cache that can lose what came first."""

    def __init__(self, *, forgets_after: int = 99, caches: bool = True) -> None:
        super().__init__()
        self.forgets_after, self.caches = forgets_after, caches

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        before = past_key_values or []
        if len(before) > self.forgets_after:
            before = before[1:]
        rows = torch.nn.functional.one_hot(input_ids, 7).float()
        start = torch.stack(before).sum(0) if before else 0
        cache = [*before, *rows.unbind(1)] if use_cache and self.caches else None
        return SimpleNamespace(logits=start + rows.cumsum(1), past_key_values=cache)


def test_a_right_cache_differs_by_nothing() -> None:
    found = decode_parity(Counting(), IDS)
    assert found is not None
    assert (found.difference, found.scale, found.tokens) == (0.0, 2.0, 12)


def test_a_cache_that_loses_a_token_differs_by_it() -> None:
    found = decode_parity(Counting(forgets_after=8), IDS)
    assert found is not None
    assert found.difference == 1.0
    early = decode_parity(Counting(forgets_after=8), IDS[:9])
    assert early is not None
    assert early.difference == 0.0


def test_without_a_cache_there_is_none_to_compare() -> None:
    assert decode_parity(Counting(caches=False), IDS) is None
    assert decode_parity(nn.Embedding(7, 7), IDS) is None


def test_a_decoder_of_transformers_differs_by_rounding() -> None:
    model = next(case for case in FAMILY_TABLE if case.name == "llama").build(depth=2).train()
    found = decode_parity(model, IDS)
    assert found is not None
    assert found.difference < 1e-5 * max(found.scale, 1.0)
    assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_is_that_of_tensors_since() -> None:  # pragma: no cover
    device = torch.device("cuda")
    torch.empty(1 << 26, device=device)
    held, peak = torch.cuda.memory_allocated(), watch_peak(device)
    torch.empty(1 << 24, dtype=torch.uint8, device=device)
    assert peak() == held + (1 << 24)


def test_a_cpu_counts_no_memory() -> None:
    assert watch_peak(torch.device("cpu"))() is None
