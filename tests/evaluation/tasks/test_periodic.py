from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aiether.evaluation.tasks import losses_by_period, periodic_windows, split_periods

VOCAB = 50


class Lookback(nn.Module):
    """Says, surely, what stood `period` tokens before the token to come."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period

    def forward(self, input_ids: Tensor) -> Tensor:
        said = input_ids.roll(self.period - 1, 1)
        return 20.0 * torch.nn.functional.one_hot(said, VOCAB).float()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(21, 70), st.floats(0, 0.6), st.integers(0, 9))
def test_what_counts_can_be_known_and_nothing_else(period: int, length: int, noise: float, seed: int) -> None:
    [(ids, known)] = periodic_windows(
        period, length=length, vocab_size=10**6, number=1, noise=noise, seed=seed
    )
    [(clean, _)] = periodic_windows(period, length=length, vocab_size=10**6, number=1, noise=0.0, seed=seed)
    assert torch.equal(clean[period:], clean[:-period])
    for place in range(length):
        before = [int(ids[earlier]) for earlier in range(place - period, -1, -period)]
        right = ids[place] == clean[place] and int(clean[place]) in before
        assert bool(known[place]) == bool(right)


def test_sequences_are_the_same_whatever_else_is_asked_for() -> None:
    more = periodic_windows(7, length=40, vocab_size=VOCAB, number=5, noise=0.2, seed=4)
    fewer = periodic_windows(7, length=40, vocab_size=VOCAB, number=2, noise=0.2, seed=4)
    assert all(
        torch.equal(a, b) for pair in zip(more, fewer, strict=False) for a, b in zip(*pair, strict=True)
    )
    others = periodic_windows(7, length=40, vocab_size=VOCAB, number=2, noise=0.2, seed=5)
    assert not torch.equal(others[0][0], fewer[0][0])
    assert not torch.equal(fewer[0][0], fewer[1][0])


def test_a_model_of_one_period_knows_that_one() -> None:
    found = losses_by_period(Lookback(8), [6, 8, 16], length=64, vocab_size=VOCAB)
    assert found[8].loss < 1e-3
    assert found[8].tokens == 8 * (64 - 8)
    assert found[6].loss > 10
    assert found[16].loss > 10
    assert math.isfinite(found[16].loss)


@given(st.integers(2, 12), st.integers(14, 40), st.integers(0, 3), st.integers(0, 99))
def test_held_out_periods_are_no_periods_of_training_sequences(
    low: int, more: int, held_out: int, seed: int
) -> None:
    trained, kept_back = split_periods(low, low + more, held_out, seed=seed)
    assert len(set(kept_back)) == held_out
    assert trained == sorted(set(trained))
    assert all(low <= period <= low + more for period in (*trained, *kept_back))
    assert not any(period % each == 0 for period in trained for each in kept_back)
    assert (trained, kept_back) == split_periods(low, low + more, held_out, seed=seed)


def test_what_does_not_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 9"):
        periodic_windows(10, length=10, vocab_size=VOCAB, number=1)
    with pytest.raises(ValueError, match="noise 1"):
        periodic_windows(3, length=10, vocab_size=VOCAB, number=1, noise=1)
    with pytest.raises(ValueError, match="at least one must be left"):
        split_periods(4, 6, 3)
    with pytest.raises(ValueError, match="multiple of a held-out one"):
        split_periods(1, 2, 1, seed=1)
