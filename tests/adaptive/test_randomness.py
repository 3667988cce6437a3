from __future__ import annotations

import torch

from aiether.adaptive.randomness import hashed_uniform


def test_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    places = torch.arange(20_000)[None].expand(4, -1)
    drawn = hashed_uniform(places, salt=3, count=torch.tensor(5))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    shares = torch.histc(drawn, 20, 0, 1) / drawn.numel()
    assert (shares - 0.05).abs().max() < 0.004
    for one, other in (
        (drawn[:, 1:], drawn[:, :-1]),
        (drawn[1:], drawn[:-1]),
        (drawn, hashed_uniform(places, 4, torch.tensor(5))),
        (drawn, hashed_uniform(places, 3, torch.tensor(6))),
    ):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.02


def test_without_a_count_every_row_gets_the_numbers_of_its_places() -> None:
    drawn = hashed_uniform(torch.tensor([[0, 1, 2], [1, 2, 3]]), salt=0)
    assert torch.equal(drawn[0, 1:], drawn[1, :-1])
    assert drawn[0].unique().numel() == 3


def test_no_generator_is_touched() -> None:
    before = torch.get_rng_state()
    hashed_uniform(torch.arange(4)[None], 0, torch.tensor(1))
    assert torch.equal(torch.get_rng_state(), before)
