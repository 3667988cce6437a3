"""All or nothing: what is left of model, optimizers and schedulers when a growth in place fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import aiether
from aiether import GrowthError, GrowthPlan
from aiether.growth import INITIALISERS, Moments
from aiether.growth.initialise import BlockSource, Initialised
from aiether.integrations import _grow

from .test_grow import Optimizers, batch, same, start, train
from .tiny import blocks


class Frozen:
    """Everything that growth touches, values and identities."""

    def __init__(self, model: Any, optimizers: Optimizers, schedulers: list[Any]) -> None:
        self.parts = model, optimizers, schedulers
        self.values = self._values()
        self.objects = self._objects()

    def _values(self) -> Any:
        model, optimizers, schedulers = self.parts
        return copy.deepcopy(
            (
                dict(model.state_dict()),
                [o.state_dict() for o in optimizers],
                [s.state_dict() for s in schedulers],
                model.config.to_dict(),
                [getattr(block.self_attn, "layer_idx", None) for block in blocks(model)],
                [(name, module.training) for name, module in model.named_modules()],
            )
        )

    def _objects(self) -> list[int]:
        model, optimizers, _ = self.parts
        found = [*model.modules(), *model.parameters(), model.config]
        for optimizer in optimizers:
            found += [optimizer.param_groups, optimizer.state, *optimizer.state, *optimizer.state.values()]
            found += [v for entries in optimizer.state.values() for v in entries.values()]
            for group in optimizer.param_groups:
                found += [group, group["params"], *group["params"]]
        return list(map(id, found))

    def assert_as_before(self) -> None:
        assert same(self._values(), self.values)
        assert self._objects() == self.objects


class Fault(Exception):
    pass


def break_initialiser(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    calls = []

    def second_call_fails(source: BlockSource) -> Initialised:
        calls.append(source)
        if len(calls) == 2:
            raise Fault
        return honest(source)

    honest = INITIALISERS["copy"]
    patch.setitem(INITIALISERS, "copy", second_call_fails)


def break_configuration(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    def refuse(config: Any, name: str, value: Any) -> None:
        if name == "layer_types":  # set after the depth
            raise Fault
        honest(config, name, value)

    honest: Any = type(model.config).__setattr__
    patch.setattr(type(model.config), "__setattr__", refuse)


def break_second_optimizer(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    class Params(list[Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            if len(value) > len(self):
                raise Fault
            super().__setitem__(key, value)

    optimizers[-1].param_groups[-1]["params"] = Params(optimizers[-1].param_groups[-1]["params"])


def break_scheduler(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    def fail(scheduler: Any) -> None:
        raise Fault

    patch.setattr(CosineAnnealingLR, "_initial_step", fail)


def break_comparison(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    def fail(*_: Any) -> None:
        raise Fault

    patch.setattr(_grow, "compare_with_fresh", fail)


def break_forward(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    def fail(module: nn.Module, *_: Any) -> None:
        if len(blocks(model)) > 2:
            raise Fault

    model.lm_head.register_forward_hook(fail)


def break_compilation(patch: pytest.MonkeyPatch, model: Any, optimizers: Optimizers) -> None:
    def fail(module: nn.Module, *_: Any, **__: Any) -> None:
        raise Fault

    blocks(model)[0].compile(backend="eager")
    patch.setattr(nn.Module, "compile", fail)


@pytest.mark.parametrize(
    "fault",
    [
        break_initialiser,
        break_configuration,
        break_second_optimizer,
        break_scheduler,
        break_comparison,
        break_forward,
        break_compilation,
    ],
)
@pytest.mark.parametrize("moments", ["zero", "reset"])
def test_a_fault_at_any_point_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], moments: Moments
) -> None:
    model, optimizers = start("muon beside adamw", "qwen3")
    schedulers = [CosineAnnealingLR(optimizer, 10) for optimizer in optimizers]
    train(model, optimizers, 1, schedulers)
    plan = GrowthPlan.front(model, 5)
    with monkeypatch.context() as patch:
        fault(patch, model, optimizers)
        before = Frozen(model, optimizers, schedulers)
        with pytest.raises(Fault):
            aiether.grow(
                model,
                plan,
                optimizer=optimizers,
                scheduler=schedulers,
                batch=batch(),
                moments=moments,
                lr_policy="restart",
                compile_block=lambda block: block.compile(),
            )
        before.assert_as_before()
    if fault not in (break_forward, break_second_optimizer):  # those stay broken
        aiether.grow(
            model, plan, optimizer=optimizers, scheduler=schedulers, compile_block=lambda block: None
        )
        assert len(blocks(model)) == 5
        train(model, optimizers, 1, schedulers)


def test_what_the_configuration_does_not_describe_is_undone() -> None:
    model, optimizers = start("adamw", "qwen3")
    blocks(model)[1].self_attn.sliding_window = 7  # type: ignore[union-attr] - the configuration says 4
    before = Frozen(model, optimizers, [])
    with pytest.raises(GrowthError, match="sliding_window=7"):
        aiether.grow(model, GrowthPlan.stack(model, 4), optimizer=optimizers)
    before.assert_as_before()
