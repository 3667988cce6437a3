from __future__ import annotations

import copy

import pytest
import torch
from tests.adaptive.models import lahr, left_padded, tokens
from torch import Tensor

from aiether.adaptive import LahrForCausalLM, set_halt_q
from aiether.adaptive.second_stage import exit_losses, halting_loss, stop_targets, train_halting_head


def test_exit_losses_are_those_of_models_that_stop_there() -> None:
    model, (input_ids, mask) = lahr("full", iterations=3), left_padded(tokens(3, 14), [0, 4, 9])
    found = exit_losses(model, {"input_ids": input_ids, "attention_mask": mask})
    assert found.losses_NBT.shape == (3, 3, 14)
    assert torch.equal(found.counted_BT[:, :-1], mask[:, 1:].bool())
    assert not found.counted_BT[:, -1].any()
    set_halt_q(model, 1.0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    last = torch.nn.functional.cross_entropy(logits[:, :-1].mT, input_ids[:, 1:], reduction="none")
    counted = found.counted_BT[:, :-1]
    assert torch.allclose(found.losses_NBT[-1, :, :-1][counted], last[counted], atol=1e-5)
    assert (found.losses_NBT[:, ~found.counted_BT] == 0).all()
    set_halt_q(model, 0.0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    first = torch.nn.functional.cross_entropy(logits[:, :-1].mT, input_ids[:, 1:], reduction="none")
    assert torch.allclose(found.losses_NBT[0, :, :-1][counted], first[counted], atol=1e-5)


def test_targets_by_hand() -> None:
    losses = torch.tensor([3.0, 2.9, 1.0, 1.05]).view(4, 1, 1)
    assert stop_targets(losses, 0.2, 1).flatten().tolist() == [1, 0, 1]
    assert stop_targets(losses, 0.2, 3).flatten().tolist() == [0, 0, 1]
    assert stop_targets(losses, 0.05, 1).flatten().tolist() == [0, 0, 1]


def test_the_head_learns_where_thinking_pays_and_nothing_else_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lahr("latent_only", iterations=3).train()
    before = copy.deepcopy(model.state_dict())
    seen: list[Tensor] = []

    def planted(_: LahrForCausalLM, state_BTD: Tensor, __: Tensor) -> Tensor:
        """Tokens whose first state lies on one side of a plane gain by every iteration, no others do."""
        seen.append(state_BTD)
        number = (len(seen) - 1) % 3
        return torch.where(seen[-1 - number][..., 0] > seen[-1 - number][..., 1], 3.0 - number, 1.0)

    monkeypatch.setattr("aiether.adaptive.second_stage._losses", planted)
    found = train_halting_head(model, [{"input_ids": tokens(8, 16, seed=seed)} for seed in range(50)], lr=0.3)
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    assert model.training
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.latent.halt_weight", "model.latent.halt_bias"}
    assert all(parameter.grad is None for parameter in model.parameters())
    set_halt_q(model.eval(), 0.5)
    batch = {"input_ids": tokens(8, 16, seed=99)}
    first = exit_losses(model, batch).states_NBTD[0]
    pays = first[..., 0] > first[..., 1]
    with torch.no_grad():
        taken = model.model(**batch, use_cache=False).iterations.float()
    assert taken[pays].mean() > taken[~pays].mean() + 0.8


def test_only_counted_tokens_teach() -> None:
    model, input_ids = lahr("latent_only", iterations=3), tokens(2, 10)
    nothing = exit_losses(model, {"input_ids": input_ids, "labels": torch.full_like(input_ids, -100)})
    assert halting_loss(model.model.latent, nothing, tau=0.0) == 0
    labels = input_ids.clone()
    labels[:, 5:] = -100
    part = exit_losses(model, {"input_ids": input_ids, "labels": labels})
    alone = exit_losses(model, {"input_ids": input_ids[:, :5]})
    found, expected = (halting_loss(model.model.latent, each, tau=0.01) for each in (part, alone))
    assert torch.allclose(found, expected, atol=1e-5)


def test_models_without_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="latent block"):
        exit_losses(lahr("mod_only"), {"input_ids": tokens()})
    for model in (lahr("mod_only"), lahr("latent_only", halting="fixed")):
        with pytest.raises(ValueError, match="halting head"):
            train_halting_head(model, [])
