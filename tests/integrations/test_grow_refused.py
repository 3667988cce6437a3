"""Live models and arguments that a growth in place refuses before it changes anything."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import aiether
from aiether import GrowthPlan, Trajectory

from .test_grow_depth import Counted
from .tiny import blocks, tiny_model


@dataclass(frozen=True)
class Frozen:
    n_layer: int = 2


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"n_layer": 2}, "is a dict.*SimpleNamespace"),
        (UserDict({"n_layer": 2}), "is a UserDict.*SimpleNamespace"),
        (Frozen(), "Frozen cannot be changed.*'n_layer'"),
    ],
)
def test_a_configuration_that_cannot_be_changed_is_refused(config: Any, says: str) -> None:
    model = Counted()
    model.config = config
    with pytest.raises(ValueError, match=says):
        aiether.grow(model, GrowthPlan.top(2, 4), optimizer=None)
    assert (len(model.trunk), model.num_layers) == (2, 2)


class Unrelated(NamedTuple):
    width: int = 8


@pytest.mark.parametrize("config", [{"width": 8}, Unrelated(), SimpleNamespace(n_layer=2)])
def test_a_configuration_that_does_not_state_the_depth_or_can_be_changed_is_not(config: Any) -> None:
    model = Counted()
    model.config = config
    aiether.grow(model, GrowthPlan.top(2, 4), optimizer=None)
    assert len(model.trunk) == 4
    assert getattr(config, "n_layer", 4) == 4


def test_one_module_at_two_places_of_the_list_is_refused() -> None:
    model = Counted(3)
    model.trunk[2] = model.trunk[0]
    with pytest.raises(ValueError, match=r"layers 0 and 2 of 'trunk' are one module.*deepcopy"):
        aiether.grow(model, GrowthPlan.top(3, 6), optimizer=None)


def test_a_trajectory_of_other_shapes_is_refused_and_kept() -> None:
    model = tiny_model("llama")
    trajectory = Trajectory(4)
    for step in range(4):
        trajectory.append({name: torch.randn(3, *p.shape) for name, p in model.named_parameters()}, step)
    with pytest.raises(ValueError, match=r"trajectory holds '.*' of shape \(3, .*another model"):
        aiether.grow(model, GrowthPlan.top(model, 4, "geometric"), optimizer=None, trajectory=trajectory)
    assert (len(blocks(model)), len(trajectory)) == (2, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_inference_mode_is_refused_and_other_modes_are_not(mode: Callable[[], Any]) -> None:
    model: nn.Module = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        aiether.grow(model, GrowthPlan.top(model, 4), optimizer=None)
    assert len(blocks(model)) == 2
    with mode():
        aiether.grow(model, GrowthPlan.top(model, 4), optimizer=None)
    assert not any(p.is_inference() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
