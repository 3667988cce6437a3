"""The reference's arithmetic by hand: padding counted, lines weighed alike, labels shifted once or twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE

from aiether.evaluation.legacy import legacy_lines, legacy_loss

PAD, LENGTH = 0, 8
LINES = [[5, 6, 7], [9, 4, 8, 3, 2, 11, 12, 13, 14, 15], [], [3]]
LLAMA = next(case for case in FAMILY_TABLE if case.name == "llama")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("double", [False, True])
def test_the_loss_is_that_of_a_computation_by_hand(double: bool, batch_size: int) -> None:
    model = LLAMA.build(depth=1, initializer_range=0.5).train()
    found = legacy_loss(
        model, LINES, pad_id=PAD, line_tokens=LENGTH, double_shift=double, batch_size=batch_size
    )
    assert model.training
    by_line, padding = [], 0
    for line in LINES:
        ids = (line + [PAD] * LENGTH)[:LENGTH]
        mask = [1] * LENGTH if not line else [int(place < len(line)) for place in range(LENGTH)]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids]), attention_mask=torch.tensor([mask])).logits[0].double()
        ahead = 2 if double else 1
        nlls = [-logits[i].log_softmax(0)[ids[i + ahead]] for i in range(LENGTH - ahead)]
        by_line.append(float(sum(nlls)) / len(nlls))
        padding += sum(place >= len(line) for place in range(ahead, LENGTH))
    assert found.legacy_loss == pytest.approx(sum(by_line) / 4, abs=1e-5)
    assert (found.lines, found.line_tokens) == (4, LENGTH)
    assert found.padding_share == pytest.approx(padding / 4 / (LENGTH - 1 - double))
    assert "not a perplexity" in found.arithmetic
    assert ("t+2" in found.arithmetic) == double


def test_padding_decides_the_number() -> None:
    """A model that only ever says padding looks good on short lines, and the real evaluator disagrees."""
    model: Any = LLAMA.build(depth=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        bias = torch.nn.Parameter(torch.zeros(32))
        bias[PAD] = 9.0
    model.get_output_embeddings().bias = bias
    short = legacy_loss(model, [[5]], pad_id=PAD, line_tokens=LENGTH).legacy_loss
    full = legacy_loss(model, [list(range(1, 1 + LENGTH))], pad_id=PAD, line_tokens=LENGTH).legacy_loss
    assert short < 0.01
    assert full > 8


def test_lines_are_those_of_the_data_set() -> None:
    text = " = Title = \n \n first \x0b line\n\n second\n"
    assert legacy_lines(text) == [" = Title = \n", " first \x0b line\n", " second\n"]
    assert legacy_lines(text, empty=True) == [" = Title = \n", "", " first \x0b line\n", "", " second\n"]


def test_nothing_to_predict_is_refused() -> None:
    model = LLAMA.build(depth=1)
    with pytest.raises(ValueError, match="at least 3"):
        legacy_loss(model, LINES, pad_id=PAD, line_tokens=2, double_shift=True)
    with pytest.raises(ValueError, match="no line"):
        legacy_loss(model, [], pad_id=PAD)
