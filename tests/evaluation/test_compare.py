"""Against sums in float64 by hand: buckets, divergence, the paired error, windows that weigh differently."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aiether.evaluation import Comparison, compare, cut_windows, sum_losses, text_windows

VOCAB = 7
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 23).astype(np.uint16)
PLACES = cut_windows(len(TOKENS), 9, stride=5)  # the first window counts 8 tokens, others 5, the last 4


class Bigram(nn.Module):
    """Logits of the next token by the present one."""

    def __init__(self, seed: int, vocab_size: int = VOCAB) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(VOCAB, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)

    def logs(self, place: int) -> Tensor:
        """Float64 log-probabilities of the token at a place of the text."""
        return self.table.weight[int(TOKENS[place - 1])].detach().double().log_softmax(0)


def compared(model: nn.Module, base: nn.Module, **settings: Any) -> Comparison:
    return compare(model, base, text_windows(TOKENS, PLACES), **settings)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_are_those_of_a_computation_by_hand(batch_size: int) -> None:
    model, base = Bigram(1), Bigram(2)
    found = compared(model, base, batch_size=batch_size)
    windows = [[start + place for place in range(first, stop - start)] for start, stop, first in PLACES]
    assert [len(places) for places in windows] == [8, 5, 5, 4]

    def gain(place: int) -> float:
        return float((base.logs(place) - model.logs(place))[int(TOKENS[place])])

    def divergence(place: int) -> float:
        return float((base.logs(place).exp() * (base.logs(place) - model.logs(place))).sum())

    counted = [place for places in windows for place in places]
    mean = sum(map(gain, counted)) / 22
    assert found.difference == pytest.approx(mean, abs=1e-6)
    assert found.kl == pytest.approx(sum(map(divergence, counted)) / 22, abs=1e-6)
    residuals = [sum(gain(place) - mean for place in places) for places in windows]
    error = math.sqrt(4 / 3 * sum(each**2 for each in residuals)) / 22
    assert found.standard_error == pytest.approx(error, rel=1e-5)
    alone = sum_losses(base, text_windows(TOKENS, PLACES))
    assert found.base.loss == alone.loss
    for of_losses, of_kl in zip(found.base.buckets(), found.divergences.buckets(), strict=True):
        inside = [
            start + place
            for start, stop, first in PLACES
            for place in range(max(first, of_kl.start), min(of_kl.stop, stop - start))
        ]
        nlls = [-float(base.logs(place)[int(TOKENS[place])]) for place in inside]
        assert of_kl.loss == pytest.approx(sum(map(divergence, inside)) / len(inside), abs=1e-6)
        assert of_losses.perplexity == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-5)
        assert of_losses.tokens == len(inside)


def test_a_model_diverges_from_itself_nowhere_and_a_single_window_has_no_error() -> None:
    found = compared(Bigram(1), Bigram(1))
    assert (found.kl, found.difference, found.standard_error) == (0.0, 0.0, 0.0)
    [window] = text_windows(TOKENS, PLACES[:1])
    assert compare(Bigram(1), Bigram(2), [window]).standard_error is None


def test_masked_entries_add_nothing_and_missing_ones_are_infinitely_far() -> None:
    base, model = Bigram(2), Bigram(1)
    with torch.no_grad():
        base.table.weight[:, -1] = -math.inf
    windows = [(torch.tensor([0, 1, 2, 3, 0]), 1)]
    assert math.isfinite(compare(model, base, windows).kl)
    assert compare(base, model, windows).kl == math.inf


def test_other_vocabularies_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match=r"predicts 7 entries and its base 8.*bits per byte"):
        compared(Bigram(1), Bigram(1, VOCAB + 1))
    broken = Bigram(1)
    with torch.no_grad():
        broken.table.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the model's base's loss is NaN"):
        compared(Bigram(1), broken)


def test_what_counts_may_be_chosen_token_by_token() -> None:
    model = Bigram(1)
    ids, which = torch.from_numpy(TOKENS.astype(np.int64)), torch.zeros(23, dtype=torch.bool)
    which[[3, 11, 20]] = True
    losses = [-float(model.logs(place)[int(TOKENS[place])]) for place in (3, 11, 20)]
    assert sum_losses(model, [(ids, which)]).loss == pytest.approx(sum(losses) / 3, abs=1e-6)
    which[0] = True
    with pytest.raises(ValueError, match="False for the first"):
        sum_losses(model, [(ids, which)])
    with pytest.raises(ValueError, match="no token of the windows counts"):
        sum_losses(model, [(ids, torch.zeros_like(which))])
