"""A model without weights is the one with weights, but for the data."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILY_TABLE
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTModel

from aiether.growth.blank import without_weights

CASES = {case.name: case for case in FAMILY_TABLE}


def build(name: str) -> PreTrainedModel:
    if name == "vit":
        return ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
        )
    return CASES[name].build()


def described(model: nn.Module) -> list[tuple[object, ...]]:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tuple(each.shape), each.dtype, each.requires_grad) for name, each in tensors]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "vit"])
def test_it_has_the_same_names_and_shapes_and_draws_nothing(name: str) -> None:
    whole, state = build(name), torch.get_rng_state()
    with without_weights():
        blank = type(whole)(whole.config)
    assert described(blank) == described(whole)
    assert {each.device.type for each in blank.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)
    assert tied(blank) == tied(whole)


def tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def test_what_is_built_afterwards_is_initialised_again() -> None:
    with pytest.raises(ValueError, match="in the middle"), without_weights():
        raise ValueError("in the middle")
    torch.manual_seed(0)
    drawn = nn.Linear(4, 4).weight
    torch.manual_seed(0)
    bound = nn.init.kaiming_uniform_(torch.empty(4, 4), a=5**0.5)
    assert torch.equal(drawn, bound)
    assert drawn.std() > 0.1
