from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aiether.evaluation import cut_windows, sum_losses, text_windows

VOCAB = 7
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 23).astype(np.uint16)


class Bigram(nn.Module):
    """Logits of the next token by the present one; notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.shapes: list[tuple[int, ...]] = []
        self.modes: set[bool] = set()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        self.modes.add(self.training)
        return SimpleNamespace(logits=self.table(input_ids))

    def nll(self, place: int) -> float:
        """By hand: minus the log of the softmax at the token of a place of the text."""
        row = self.table.weight[int(TOKENS[place - 1])].detach().double()
        return float(torch.logsumexp(row, 0) - row[int(TOKENS[place])])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("stride", [None, 2])
def test_the_loss_is_that_of_the_tokens_that_count(batch_size: int, stride: int | None) -> None:
    model = Bigram().train()
    places = cut_windows(len(TOKENS), 5, stride)
    sums = sum_losses(model, text_windows(TOKENS, places), batch_size=batch_size)
    counted = [start + place for start, stop, first in places for place in range(first, stop - start)]
    assert sums.tokens == len(counted) == (22 if stride else 16)
    assert sums.loss == pytest.approx(sum(map(model.nll, counted)) / len(counted), abs=1e-6)
    assert sums.inputs == 5 * len(places)
    assert sums.windows == len(places)
    assert max(rows for rows, _ in model.shapes) == min(batch_size, len(places))
    assert model.modes == {False}
    assert model.training


def test_windows_of_unequal_length_are_weighed_by_tokens_and_never_padded() -> None:
    model = Bigram()
    windows = [(torch.from_numpy(TOKENS[a:b].astype(np.int64)), 1) for a, b in ((0, 9), (9, 12), (12, 15))]
    sums = sum_losses(model, windows)
    counted = [*range(1, 9), 10, 11, 13, 14]
    assert sums.loss == pytest.approx(sum(map(model.nll, counted)) / 12, abs=1e-6)
    assert model.shapes == [(1, 9), (2, 3)]


def test_the_loss_by_what_stands_before() -> None:
    model = Bigram()
    buckets = sum_losses(model, text_windows(TOKENS, cut_windows(len(TOKENS), 7))).buckets()
    assert [(each.start, each.stop, each.tokens) for each in buckets] == [(1, 2, 3), (2, 4, 6), (4, 7, 9)]
    for each in buckets:
        places = [7 * window + place for window in range(3) for place in range(each.start, each.stop)]
        assert each.loss == pytest.approx(sum(map(model.nll, places)) / len(places), abs=1e-6)


def test_the_loss_is_not_clamped_and_nan_is_a_fault() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.weight.fill_(0.0).fill_diagonal_(-1e4)
    repeated = [(torch.zeros(4, dtype=torch.int64), 1)]
    assert sum_losses(model, repeated).loss == pytest.approx(1e4 + math.log(VOCAB - 1))
    with torch.no_grad():
        model.table.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="loss is NaN"):
        sum_losses(model, repeated)
    with pytest.raises(ValueError, match="no window"):
        sum_losses(model, [])


def test_bfloat16_is_close_and_not_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB))
    windows = list(text_windows(TOKENS, cut_windows(len(TOKENS), 5)))
    exact, rounded = sum_losses(model, windows).loss, sum_losses(model, windows, bf16=True).loss
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=2e-2)
