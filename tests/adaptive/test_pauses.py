from __future__ import annotations

import pytest
import torch
from tests.adaptive.models import lahr, tokens

from aiether.adaptive import insert_pauses

PAUSE = 3


@pytest.mark.parametrize("seed", range(5))
def test_only_pauses_are_added_where_each_row_wants_them(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    count, positions = seed, torch.randint(0, 13, (6,), generator=draw)
    input_ids, labels = torch.randint(4, 50, (2, 6, 12), generator=draw)
    mask = (torch.rand(6, 12, generator=draw) < 0.8).long()
    paused = insert_pauses(input_ids, positions, count, PAUSE, labels=labels, attention_mask=mask)
    for row, at in enumerate(positions.tolist()):
        gap = slice(at, at + count)
        for before, after, filler in zip((input_ids, labels, mask), paused, (PAUSE, -100, 1), strict=True):
            assert (after[row, gap] == filler).all()
            assert torch.equal(torch.cat([after[row, :at], after[row, at + count :]]), before[row])
    default = insert_pauses(input_ids, positions, count, PAUSE, attention_mask=mask)
    assert torch.equal(default.labels == -100, (default.input_ids == PAUSE) | (default.attention_mask == 0))


def test_what_stands_before_a_pause_is_predicted_as_ever_and_what_follows_is_not() -> None:
    model, input_ids = lahr("latent_only", iterations=2).eval(), tokens(3, 12)
    positions = torch.tensor([2, 7, 11])
    paused = insert_pauses(input_ids, positions, 4, PAUSE).input_ids
    with torch.no_grad():
        before, after = model(input_ids, use_cache=False).logits, model(paused, use_cache=False).logits
    for row, at in enumerate(positions.tolist()):
        assert torch.allclose(before[row, :at], after[row, :at], atol=1e-5)
        assert not torch.allclose(before[row, at], after[row, at + 4], atol=1e-3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[13\], and rows have 12 tokens"):
        insert_pauses(tokens(2, 12), 13, 1, PAUSE)
    with pytest.raises(ValueError, match="count is -1"):
        insert_pauses(tokens(2, 12), 0, -1, PAUSE)
