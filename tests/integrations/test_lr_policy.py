"""Learning-rate policies after a growth: in place, and under fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim import lr_scheduler as schedules
from transformers import PreTrainedModel
from transformers.optimization import Adafactor

import aiether
from aiether import FitResult, GrowthConfig, GrowthPlan, Rewarm, RunObserver, fit
from aiether.growth import LrPolicy
from aiether.integrations._lr_policy import SlowedTensors
from aiether.training.optimizer import MuonAdamW

from .test_grow import batch, same, train
from .tiny import AtStep, blocks, tiny_model, tiny_trainer

LR = 1e-2
Build = Callable[[list[dict[str, Any]]], Optimizer]
KINDS: dict[str, Build] = {
    "adamw": lambda groups: AdamW(groups, lr=LR, weight_decay=0.1),
    "sgd": lambda groups: SGD(groups, lr=LR, momentum=0.9, weight_decay=0.1),
    "combined": lambda groups: MuonAdamW([{**g, "algorithm": "adamw", "lr": LR} for g in groups]),
}


def grown(policy: LrPolicy, kind: str) -> tuple[PreTrainedModel, Optimizer, aiether.GrowthReport]:
    model = tiny_model("llama", dropout=0.0)
    optimizer = KINDS[kind]([{"params": list(model.parameters())}])
    train(model, [optimizer], 2)
    plan = GrowthPlan.interleave(model, 4, init="noise")
    report = aiether.grow(model, plan, optimizer=optimizer, lr_policy=policy, rewarm_steps=4)
    return model, optimizer, report


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rewarm_new_is_a_learning_rate_of_their_own_for_the_new_tensors(kind: str) -> None:
    reference, optimizer, report = grown("unchanged", kind)
    state = {p: dict(entries) for p, entries in optimizer.state.items()}
    named = dict(reference.named_parameters())
    split = [
        {"params": [p for name, p in named.items() if (name in report.new_tensors) == is_new]}
        for is_new in (False, True)
    ]
    two = KINDS[kind](split)
    two.state.update(state)
    for step in range(6):
        two.param_groups[1]["lr"] = LR * min(1.0, (step + 1) / 4)
        reference(**batch(step)).loss.backward()
        two.step()
        two.zero_grad()

    model, optimizer, report = grown("rewarm_new", kind)
    train(model, [optimizer], 6)
    assert report.rewarm is not None
    assert report.rewarm.finished
    assert len(optimizer.param_groups) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-6)


def test_rewarm_all_scales_every_step_and_no_schedule_sees_it() -> None:
    reference, optimizer, _ = grown("unchanged", "adamw")
    for step in range(6):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 4)
        train_on(reference, optimizer, step)
    model, optimizer, _ = grown("rewarm_all", "adamw")
    schedule = schedules.ExponentialLR(optimizer, 1.0)
    for step in range(6):
        train_on(model, optimizer, step)
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == LR
    assert same(dict(model.state_dict()), dict(reference.state_dict()))


def train_on(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    model(**batch(step)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("policy", ["rewarm_new", "rewarm_all"])
def test_a_rewarm_goes_on_after_a_resume(policy: LrPolicy) -> None:
    whole, optimizer, _ = grown(policy, "adamw")
    train(whole, [optimizer], 5)

    cut, optimizer, report = grown(policy, "adamw")
    assert report.rewarm is not None
    train(cut, [optimizer], 2)  # batches 0 and 1, as the whole run's first two
    saved = copy.deepcopy((cut.state_dict(), optimizer.state_dict(), report.rewarm.state_dict()))
    fresh = tiny_model("llama", 4, dropout=0.0)
    fresh.load_state_dict(saved[0])
    optimizer = KINDS["adamw"]([{"params": list(fresh.parameters())}])
    optimizer.load_state_dict(saved[1])
    rewarm = Rewarm.resume(fresh, optimizer, saved[2])
    for step in range(2, 5):
        assert not rewarm.finished or step == 4
        train_on(fresh, optimizer, step)
    assert rewarm.finished
    for name, value in whole.state_dict().items():
        assert same(fresh.state_dict()[name], value), name
    with pytest.raises(ValueError, match="of 1 optimizers"):
        Rewarm.resume(fresh, [optimizer, optimizer], saved[2])


def test_several_optimizers_rewarm_each_by_its_own_steps_and_can_be_stopped() -> None:
    model = tiny_model("llama", dropout=0.0)
    hidden = [p for p in blocks(model).parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not other for other in hidden)]
    optimizers = [Muon(hidden, lr=LR), AdamW(rest, lr=LR)]
    report = aiether.grow(
        model, GrowthPlan.top(model, 3), optimizer=optimizers, lr_policy="rewarm_new", rewarm_steps=10
    )
    train(model, optimizers, 2)
    assert report.rewarm is not None
    assert report.rewarm.steps_done == [2, 2]
    report.rewarm.remove()
    train(model, optimizers, 1)
    assert report.rewarm.steps_done == [2, 2]


@pytest.mark.parametrize("second", ["rewarm_new", "rewarm_all"])
def test_overlapping_rewarms_leave_the_schedule_alone(second: LrPolicy) -> None:
    model = tiny_model("llama", dropout=0.0)
    optimizer, used = SGD(model.parameters(), lr=LR), []
    policies: list[LrPolicy] = ["rewarm_all", second]
    for depth, policy in zip((3, 4), policies, strict=True):
        aiether.grow(
            model, GrowthPlan.top(model, depth), optimizer=optimizer, lr_policy=policy, rewarm_steps=4
        )
        if depth == 4:
            optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
        for step in range(5 if depth == 4 else 1):
            train_on(model, optimizer, step)
            assert optimizer.param_groups[0]["lr"] == LR
    both = [1 / 4, 2 / 4, 3 / 4, 1, 1] if second == "rewarm_all" else [1] * 5
    assert used == pytest.approx([LR * a * b for a, b in zip([2 / 4, 3 / 4, 1, 1, 1], both, strict=True)])


def test_a_rewarm_names_its_tensors_as_a_later_growth_left_them() -> None:
    model = tiny_model("llama")
    optimizer = SGD(model.parameters(), lr=LR)
    report = aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizer, lr_policy="rewarm_new")
    new = [model.get_parameter(name) for name in report.new_tensors]
    aiether.grow(model, GrowthPlan.front(model, 4), optimizer=optimizer)
    assert report.rewarm is not None
    state = report.rewarm.state_dict()
    assert [id(model.get_parameter(name)) for name in state["tensors"]] == list(map(id, new))
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.3"):
        Rewarm.resume(tiny_model("llama"), optimizer, state)


def test_a_rewarm_keeps_double_precision() -> None:
    model = nn.Linear(2, 2).double()
    tensor = model.weight
    slowed = SlowedTensors([tensor])
    with torch.no_grad():
        tensor.fill_(1.0)
        slowed.before(0.5)
        tensor.fill_(1.0 + 2.0**-40)
        slowed.after()
    assert torch.equal(tensor, torch.full_like(tensor, 1.0 + 2.0**-41))


# -- restart ------------------------------------------------------------------------------------------------

RESTARTABLE: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.5**step),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=9),
    "linear": lambda o: schedules.LinearLR(o, 0.1, total_iters=6),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
}


@pytest.mark.parametrize("name", sorted(RESTARTABLE))
def test_restart_begins_the_schedule_again(name: str) -> None:
    model = tiny_model("llama")
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9)
    schedule = RESTARTABLE[name](optimizer)

    def rates(steps: int) -> list[float]:
        seen = [optimizer.param_groups[0]["lr"]]
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    first = rates(4)
    aiether.grow(
        model, GrowthPlan.top(model, 3), optimizer=optimizer, scheduler=schedule, lr_policy="restart"
    )
    assert rates(4) == pytest.approx(first)


def test_restart_of_several_schedules_on_one_optimizer() -> None:
    model = tiny_model("llama")
    optimizer = SGD(model.parameters(), lr=LR)
    both = [schedules.LinearLR(optimizer, 0.1, total_iters=4), schedules.ExponentialLR(optimizer, 0.9)]

    def rates(steps: int) -> list[float]:
        seen = [optimizer.param_groups[0]["lr"]]
        for _ in range(steps):
            optimizer.step()
            for schedule in both:
                schedule.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    first = rates(5)
    aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizer, scheduler=both, lr_policy="restart")
    assert rates(5) == pytest.approx(first)


def test_restart_keeps_a_learning_rate_that_is_a_tensor_and_its_beginning() -> None:
    model = tiny_model("llama")
    optimizer = AdamW(model.parameters(), lr=torch.tensor(LR))
    schedule, group = schedules.ExponentialLR(optimizer, 0.5), optimizer.param_groups[0]
    rate = group["lr"]
    for _ in range(2):
        optimizer.step()
        schedule.step()
    aiether.grow(
        model, GrowthPlan.top(model, 3), optimizer=optimizer, scheduler=schedule, lr_policy="restart"
    )
    assert group["lr"] is rate
    optimizer.step()
    schedule.step()
    assert float(rate) == pytest.approx(LR / 2)
    assert float(group["initial_lr"]) == pytest.approx(LR)


@pytest.mark.parametrize(
    "build",
    [
        lambda o: schedules.ReduceLROnPlateau(o),
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)], milestones=[2]
        ),
    ],
)
def test_schedules_without_a_beginning_to_go_back_to_are_refused(build: Callable[[Optimizer], Any]) -> None:
    model = tiny_model("llama")
    optimizer = SGD(model.parameters(), lr=LR)
    schedule = build(optimizer)
    before = optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="make a new scheduler"):
        aiether.grow(
            model, GrowthPlan.top(model, 3), optimizer=optimizer, scheduler=schedule, lr_policy="restart"
        )
    assert (len(blocks(model)), optimizer.param_groups[0]["lr"]) == (2, before)


def test_policies_need_what_they_act_on() -> None:
    model = tiny_model("llama")
    plan, optimizer = GrowthPlan.top(model, 3), SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="needs the scheduler"):
        aiether.grow(model, plan, optimizer=optimizer, lr_policy="restart")
    with pytest.raises(ValueError, match="needs the optimizer"):
        aiether.grow(model, plan, optimizer=None, lr_policy="rewarm_all")
    other = schedules.ExponentialLR(SGD(model.parameters(), lr=LR), 0.9)
    with pytest.raises(ValueError, match="does not drive"):
        aiether.grow(model, plan, optimizer=optimizer, scheduler=other)
    relative = Adafactor(model.parameters(), lr=None, relative_step=True)
    with pytest.raises(ValueError, match="makes its own"):
        aiether.grow(model, plan, optimizer=relative, lr_policy="rewarm_all")


# -- under fit ----------------------------------------------------------------------------------------------


class Watch(RunObserver):
    """Learning rates by step, and every stage's starting weights."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.at_stage: list[dict[str, torch.Tensor]] = []

    def on_stage(self, *, stage: int, step: int, model: PreTrainedModel, lineage: Any) -> None:
        self.at_stage.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_log(self, row: dict[str, Any]) -> None:
        self.rates[row["step"]] = row["learning_rate"]


def run(
    tmp_path: Path, policy: LrPolicy, *, resume: bool = False, **settings: Any
) -> tuple[FitResult, Watch]:
    growth = GrowthConfig(
        trigger="fixed",
        growth_fractions=(0.5,),
        placement="front",
        grow_by=1,
        init="noise",
        protocol="none",
        warmup_steps=0,
        lr_policy=policy,
        rewarm_steps=4,
    )
    plain = {"max_steps": 12, "logging_steps": 1, "save_steps": 7, "eval_strategy": "no"}
    trainer = tiny_trainer(
        tmp_path, tiny_model("llama"), **{**plain, "lr_scheduler_type": "linear", **settings}
    )
    watch = Watch()
    return fit(trainer, growth, observers=[watch], resume=resume), watch


def test_fit_rewarms_restarts_or_leaves_the_learning_rate_as_asked(tmp_path: Path) -> None:
    plain, unchanged = run(tmp_path / "unchanged", "unchanged", warmup_steps=2)
    assert plain.num_growths == 1
    _, every = run(tmp_path / "all", "rewarm_all", warmup_steps=2)
    _, new = run(tmp_path / "new", "rewarm_new", warmup_steps=2)
    _, restart = run(tmp_path / "restart", "restart", warmup_steps=2)
    factors = {7: 0.25, 8: 0.5, 9: 0.75}
    for step, rate in unchanged.rates.items():
        assert every.rates[step] == pytest.approx(rate * factors.get(step, 1.0))
        assert new.rates[step] == rate
        if step > 6:
            assert restart.rates[step] == pytest.approx(3e-3 * [0, 0.5, 1, 0.75, 0.5, 0.25][step - 7])


def test_fit_moves_new_tensors_by_the_fraction_that_the_rewarm_allows(tmp_path: Path) -> None:
    starts: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    for policy in ("unchanged", "rewarm_new"):
        after = AtStep(7, lambda model, optimizer, key=policy: ends.update({key: snapshot(model)}))
        _, watch = run(tmp_path / policy, policy, callbacks=[after])  # type: ignore[arg-type]
        starts[policy] = watch.at_stage[1]
    assert same(starts["unchanged"], starts["rewarm_new"])
    for name, start in starts["unchanged"].items():
        full, slow = ends["unchanged"][name] - start, ends["rewarm_new"][name] - start
        factor = 0.25 if name.startswith("model.layers.0.") else 1.0
        torch.testing.assert_close(slow, full * factor, rtol=1e-3, atol=1e-6)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fail(model: nn.Module, optimizer: Any) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("policy", ["rewarm_new", "restart"])
def test_a_run_cut_in_the_midst_of_a_rewarm_resumes_to_the_same_bits(
    tmp_path: Path, policy: LrPolicy
) -> None:
    whole, _ = run(tmp_path / "whole", policy)
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path / "cut", policy, callbacks=[AtStep(8, fail)])
    again, _ = run(tmp_path / "cut", policy, resume=True)
    assert again.depth == 3
    assert same(dict(again.model.state_dict()), dict(whole.model.state_dict()))


def test_fit_refuses_to_restart_a_schedule_of_the_users_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    optimizer = AdamW(model.parameters(), lr=LR)
    trainer = tiny_trainer(tmp_path, model, optimizers=(optimizer, schedules.ExponentialLR(optimizer, 0.9)))
    with pytest.raises(ValueError, match="lr_policy='restart'"):
        fit(trainer, GrowthConfig(trigger="never", protocol="none", lr_policy="restart"))
