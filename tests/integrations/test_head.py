"""The compiled head gives transformers' own loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from aiether.integrations import _head
from aiether.integrations._head import causal_loss, head_loss

from .tiny import CONTEXT, VOCAB, tiny_model


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_head, "compiled_head_loss", lambda: head_loss)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (3, CONTEXT), generator=generator)
    labels = ids.clone()
    labels[0, 5:9] = _head.IGNORED
    return ids, labels


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3", "phi"])
@pytest.mark.parametrize("num_items", [None, 37])
def test_loss_and_gradients_are_those_of_transformers(arch: str, num_items: int | None) -> None:
    ids, labels = batch()
    items = None if num_items is None else torch.tensor(num_items)
    model = tiny_model(arch, dropout=0.0)
    extra: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    theirs = model(input_ids=ids, labels=labels, **extra).loss
    theirs.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = causal_loss(model, ids, labels, items)
    ours.backward()
    assert torch.allclose(ours, theirs, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_one_compiled_head_serves_every_depth() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(head_loss, backend=counter)
    for depth in (1, 2, 4):
        model = tiny_model(depth=depth, dropout=0.0)
        ids, labels = batch()
        hidden = model.base_model(input_ids=ids).last_hidden_state
        compiled(hidden, model.get_parameter("transformer.wte.weight"), labels, torch.tensor(37)).backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()
