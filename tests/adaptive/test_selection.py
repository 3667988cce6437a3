from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aiether.adaptive.selection import Budget, Slots, add_back, first, gather, kth_score, top_k, within_budget

RATES = st.integers(1, 10_000).map(lambda parts: parts / 10_000)


def _in_turn(wanted: list[bool], places: list[int], budget: Budget, used: int) -> list[bool]:
    """The budget's rule as a loop."""
    admitted = []
    for want, place in zip(wanted, places, strict=True):
        bound = math.ceil(round(budget.rate * 10_000) * (place + 1) / 10_000) + budget.burst
        admitted.append(want and used < bound)
        used += admitted[-1]
    return admitted


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    rate=RATES,
    burst=st.integers(0, 4),
    length=st.integers(1, 24),
    padding=st.integers(0, 5),
    cut=st.integers(0, 24),
)
def test_a_budget_admits_in_order_what_a_loop_admits_and_a_cache_changes_nothing(
    data: st.DataObject, rate: float, burst: int, length: int, padding: int, cut: int
) -> None:
    budget = Budget(rate, burst)
    wanted = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    row = torch.tensor([[False] * padding + wanted])
    places = torch.tensor([[0] * padding + list(range(length))])
    expected = [False] * padding + _in_turn(wanted, list(range(length)), budget, 0)
    assert within_budget(row, places, budget)[0].tolist() == expected
    cut = min(cut, length) + padding
    before, after = row[:, :cut], row[:, cut:]
    first_part = within_budget(before, places[:, :cut], budget)
    if after.shape[1]:
        rest = within_budget(after, places[:, cut:], budget, first_part.sum(-1))
        assert torch.cat([first_part, rest], -1)[0].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(rate=RATES, burst=st.integers(0, 20), place=st.integers(0, 5_000))
def test_the_bound_at_a_position_is_the_bound_after_its_token(rate: float, burst: int, place: int) -> None:
    budget = Budget(rate, burst)
    assert budget.after(place + 1) == min(place + 1, int(budget.at(torch.tensor(place))))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=20, unique=True),
    RATES,
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_top_k_takes_the_highest_of_a_rows_own_tokens_in_order(
    scores: list[int], rate: float, before: int, behind: int
) -> None:
    row = torch.tensor([[99.0] * before + [float(s) for s in scores] + [99.0] * behind])
    present = torch.tensor([[False] * before + [True] * len(scores) + [False] * behind])
    slots = top_k(row, present, rate)
    count = math.ceil(len(scores) * round(rate * 10_000) / 10_000)
    highest = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
    assert slots.index_BK[0][slots.filled_BK[0]].tolist() == [before + i for i in highest]
    assert slots.count_B.tolist() == [count]
    assert slots.filled_BK[0].int().diff().le(0).all(), "empty slots come last"
    assert kth_score(row, present, rate).item() == min(scores[i] for i in highest)


def test_the_kth_score_of_rows_without_tokens_says_nothing() -> None:
    scores, present = torch.tensor([[3.0, 5.0], [7.0, 9.0]]), torch.tensor([[True, True], [False, False]])
    assert kth_score(scores, present, 0.5).item() == 5.0
    assert kth_score(scores, torch.zeros_like(present), 0.5).item() == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 20))
def test_slots_hold_the_first_wanted_tokens_and_go_back_where_they_came_from(
    wanted: list[bool], slots: int
) -> None:
    row = torch.tensor([wanted])
    chosen = first(row, min(slots, len(wanted)))
    places = [index for index, want in enumerate(wanted) if want][:slots]
    assert chosen.index_BK[0][chosen.filled_BK[0]].tolist() == places
    assert len(set(chosen.index_BK[0].tolist())) == chosen.index_BK.shape[-1], "no token has two slots"
    values = torch.randn(1, len(wanted), 3)
    change = torch.full_like(gather(values, chosen), float("nan"))
    change[chosen.filled_BK] = gather(values, chosen)[chosen.filled_BK]
    doubled: Tensor = values.clone()
    doubled[:, places] *= 2
    assert torch.equal(add_back(values, chosen, change), doubled)


def test_a_batch_of_one_is_gathered_for_every_row() -> None:
    slots = Slots(torch.tensor([[0, 2], [1, 2]]), torch.ones(2, 2, dtype=torch.bool))
    positions = torch.tensor([[10, 11, 12]])
    assert gather(positions, slots).tolist() == [[10, 12], [11, 12]]
