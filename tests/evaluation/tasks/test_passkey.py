from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from aiether.data.tokenizer import train_tokenizer
from aiether.evaluation.tasks import id_wording, make_passkeys, score_passkeys, text_wording
from aiether.evaluation.tasks.passkey import AFTER, BEFORE, FILLER, QUESTION

VOCAB = 40
TOKENIZER = train_tokenizer([FILLER + BEFORE + AFTER + QUESTION], 330)


def encode(text: str) -> list[int]:
    [ids] = TOKENIZER.encode([text])
    return ids


class Finder(nn.Module):
    """Repeats what followed the first marker, as far as it can look back."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = []
        for ids in input_ids.tolist():
            first, last = ids.index(VOCAB - 1), len(ids) - 1 - ids[::-1].index(VOCAB - 1)
            said = [0] * last + [ids[first + 1 + place] for place in range(len(ids) - last)]
            rows.append(said if last - first <= self.reach else [0] * len(ids))
        return torch.nn.functional.one_hot(torch.tensor(rows), VOCAB).float()


def test_the_key_is_in_the_text_where_it_was_hidden_and_at_the_end() -> None:
    depths = (0.0, 0.5, 1.0)
    prompts = make_passkeys(text_wording(encode), (260, 300), depths, trials=2, seed=3)
    assert [len(prompt.ids) for prompt in prompts] == [260] * 6 + [300] * 6
    starts: dict[float, int] = {}
    keys = set()
    for prompt in prompts:
        text = TOKENIZER.backend.decode(prompt.ids.tolist())
        found = re.findall(r"pass key is (\d{5})", text)
        assert len(found) == 2
        assert found[0] == found[1]
        answer = TOKENIZER.backend.decode(prompt.ids[-prompt.answer :].tolist())
        assert answer == f" {found[0]}"
        assert text.endswith(QUESTION + answer)
        keys.add(found[0])
        if len(prompt.ids) == 300:
            starts[prompt.depth] = text.index(BEFORE)
    assert len(keys) == 12
    assert starts[0.0] == 0 < starts[0.5] < starts[1.0]


def test_a_prompt_depends_on_its_own_cell_alone() -> None:
    wording = id_wording(VOCAB)
    many = make_passkeys(wording, (30, 60), (0.25, 1), trials=3, seed=1)
    [alone] = make_passkeys(wording, (60,), (1.0,), seed=1)
    assert any(torch.equal(alone.ids, prompt.ids) and prompt.depth == 1 for prompt in many)
    assert not torch.equal(alone.ids, make_passkeys(wording, (60,), (1.0,), seed=2)[0].ids)
    assert all(int(prompt.ids.max()) < VOCAB for prompt in many)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_exact_matches_are_counted_by_length_and_depth(batch_size: int) -> None:
    prompts = make_passkeys(id_wording(VOCAB), (60, 30), (1.0, 0.0), trials=3)
    cells = score_passkeys(Finder(reach=40), prompts, batch_size=batch_size)
    assert cells == ((30, 0.0, 3, 3), (30, 1.0, 3, 3), (60, 0.0, 0, 3), (60, 1.0, 3, 3))


def test_one_wrong_token_is_no_match() -> None:
    class Nearly(Finder):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = super().forward(input_ids)
            logits[:, -1] = 0.0
            return logits

    prompts = make_passkeys(id_wording(VOCAB), (30,), (0.5,))
    assert score_passkeys(Nearly(40), prompts)[0].right == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 12"):
        make_passkeys(id_wording(VOCAB), (11,))
    assert len(make_passkeys(id_wording(VOCAB), (12,))) == 5
    with pytest.raises(ValueError, match=r"depth is 1\.5"):
        make_passkeys(id_wording(VOCAB), (30,), (1.5,))
