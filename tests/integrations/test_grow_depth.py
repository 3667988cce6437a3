"""Plain modules that state their depth beside the list of blocks: it grows along, or the growth is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from transformers import LlamaModel

import aiether
from aiether import GrowthError, GrowthPlan
from aiether.growth import family_of

from .test_grow import batch
from .test_grow_faults import Fault
from .tiny import blocks, tiny_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(hidden)


class Counted(nn.Module):
    """Runs as many blocks as an attribute of its own, or of a settings object, says."""

    def __init__(self, depth: int = 2, *, name: str = "num_layers") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.width, self.first_of_two = name, 2, True
        setattr(self, name, depth)
        self.stem = nn.Linear(8, 8)
        self.trunk = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.stem(hidden)
        for index in range(getattr(self, self.name)):
            hidden = self.trunk[index](hidden)
        return hidden


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.depth, self.head = inner, 2, nn.Linear(8, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.depth == len(self.inner.trunk)  # type: ignore[arg-type]
        return self.head(self.inner(hidden))


HIDDEN = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
NAMES = ["num_layers", "n_layer", "n_layers", "depth", "num_hidden_layers", "num_blocks", "_num_layers"]


def trains(model: nn.Module, path: str) -> list[bool]:
    model(HIDDEN).square().sum().backward()
    return [all(p.grad is not None for p in block.parameters()) for block in model.get_submodule(path)]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_layers_grows_with_the_list(name: str) -> None:
    model = Counted(name=name)
    report = aiether.grow(model, GrowthPlan.stack(model, 4), optimizer=SGD(model.parameters(), lr=0.1))
    assert (getattr(model, name), model.width, model.first_of_two) == (4, 2, True)
    assert trains(model, "trunk") == [True] * 4
    assert any(f"{name} was set from 2 to 4" in note for note in report.notes)


def test_so_it_does_in_modules_around_the_one_that_holds_the_list_and_in_no_others() -> None:
    model = Outer(Counted())
    model.head.num_layers = 2  # type: ignore[assignment]
    report = aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)
    assert (model.depth, model.inner.num_layers, model.head.num_layers) == (3, 3, 2)
    assert trains(model, "inner.trunk") == [True] * 3
    assert sum("was set from 2 to 3" in note for note in report.notes) == 2


def test_an_encoder_of_torch_grows_with_its_number() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})
    aiether.grow(model, GrowthPlan.stack(model, 4), optimizer=None)
    assert model["encoder"].num_layers == len(model["encoder"].layers) == 4  # type: ignore[arg-type]


def test_a_growth_that_fails_sets_the_number_back() -> None:
    model = Counted()
    model.trunk[1].compile(backend="eager")

    def fail(block: nn.Module) -> None:
        raise Fault

    with pytest.raises(Fault):
        aiether.grow(model, GrowthPlan.top(model, 4), optimizer=None, compile_block=fail)
    assert (model.num_layers, len(model.trunk)) == (2, 2)


@pytest.mark.parametrize("init", ["copy", "zero"])
@pytest.mark.parametrize("placement", ["top", "interleave"])
def test_new_layers_that_do_not_run_on_the_batch_undo_the_growth(placement: str, init: Any) -> None:
    model = Counted(name="rounds")  # a name that says nothing
    optimizer = SGD(model.parameters(), lr=0.1)
    before = list(model.parameters())
    plan = getattr(GrowthPlan, placement)(model, 4, init)
    with pytest.raises(GrowthError, match="do not run"):
        aiether.grow(model, plan, optimizer=optimizer, batch=HIDDEN)
    assert list(model.parameters()) == before
    assert optimizer.param_groups[0]["params"] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    report = aiether.grow(model, plan, optimizer=optimizer)
    assert any("give a batch" in note for note in report.notes)


def test_a_batch_that_does_not_reach_the_blocks_undoes_the_growth() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Counted(), Counted()

        def forward(self, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
            outputs = torch.zeros(4, 8)
            if left is not None:
                outputs = outputs + self.left(left)
            return outputs if right is None else outputs + self.right(right)

    model = Towers()
    family = family_of(model, blocks="left.trunk")
    with pytest.raises(GrowthError, match="no new layer"):
        aiether.grow(model, GrowthPlan.top(2, 3), optimizer=None, family=family, batch={"right": HIDDEN})
    assert (len(model.left.trunk), model.left.num_layers) == (2, 2)
    report = aiether.grow(model, GrowthPlan.top(2, 3), optimizer=None, family=family, batch={"left": HIDDEN})
    assert report.function is not None
    assert report.function.gap > 0


def test_layers_that_add_nothing_yet_may_be_copied() -> None:
    model = Counted()
    with torch.no_grad():
        for block in model.trunk:
            for parameter in block.parameters():
                parameter.zero_()
    report = aiether.grow(model, GrowthPlan.top(model, 4, "copy"), optimizer=None, batch=HIDDEN)
    assert report.function is not None
    assert report.function.gap == 0  # they run, and their gradients are not zero
    assert trains(model, "trunk") == [True] * 4


def test_a_transformers_model_inside_a_plain_module_is_refused_by_name() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone: LlamaModel = tiny_model("llama").model
            self.score = nn.Linear(16, 1)

    model = Scored()
    with pytest.raises(ValueError, match=r"grow it itself, aiether.grow\(model.backbone, "):
        aiether.grow(model, GrowthPlan.top(model, 4), optimizer=None)
    assert len(model.backbone.layers) == 2
    aiether.grow(model.backbone, GrowthPlan.top(model.backbone, 4), optimizer=SGD(model.parameters(), lr=0.1))
    assert model.backbone.config.num_hidden_layers == len(model.backbone.layers) == 4


def test_a_wrapper_that_passes_the_configuration_on_grows() -> None:
    class Passing(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.base = model

        @property
        def config(self) -> Any:
            return self.base.config

        def forward(self, **kwargs: Any) -> Any:
            return self.base(**kwargs)

    model = Passing(tiny_model("llama"))
    family = family_of(model, blocks="base.model.layers")
    aiether.grow(model, GrowthPlan.top(2, 4), optimizer=None, family=family, batch=batch())
    assert model.config.num_hidden_layers == len(blocks(model.base)) == 4
