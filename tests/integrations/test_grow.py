"""Growth of a live model in place: optimizers, moments and placements, and what is left when it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Adagrad, AdamW, Muon, NAdam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import PreTrainedModel
from transformers.optimization import Adafactor as HFAdafactor

import aiether
from aiether import GrowthConfig, GrowthError, GrowthPlan, GrowthReport, Trajectory
from aiether.growth import Moments, depth_of, family_of, renames
from aiether.integrations._grow_optimizer import moments_of
from aiether.integrations._model import build_model
from aiether.training.optimizer import build_optimizer

from .tiny import CONTEXT, VOCAB, blocks, tiny_model

Optimizers = list[Optimizer]


def adamw(model: nn.Module, **settings: Any) -> Optimizers:
    """Groups as the Trainer makes them: matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1, "lr": 2e-3}, {"params": vectors, "weight_decay": 0.0}]
    return [AdamW(groups, lr=1e-3, **settings)]


def muon_and_adamw(model: nn.Module) -> Optimizers:
    hidden = [p for p in blocks(model).parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not other for other in hidden)]
    return [Muon(hidden, lr=1e-3), AdamW(rest, lr=1e-3)]


def combined(model: nn.Module) -> Optimizers:
    path = family_of(model).blocks
    return [build_optimizer(model, path, name="muon", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizers]] = {
    "adamw": lambda model: adamw(model, foreach=False),
    "adamw foreach": lambda model: adamw(model, foreach=True, amsgrad=True),
    "adamw fused": lambda model: adamw(model, fused=True),
    "muon beside adamw": muon_and_adamw,
    "combined": combined,
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)],
    "adafactor": lambda model: [Adafactor(model.parameters(), lr=1e-2)],
    "transformers' adafactor": lambda model: [HFAdafactor(model.parameters(), lr=None, relative_step=True)],
    "nadam": lambda model: [NAdam(model.parameters(), lr=1e-3)],
    "adagrad": lambda model: [Adagrad(model.parameters(), lr=1e-3, initial_accumulator_value=0.5)],
}


def batch(seed: int = 5) -> dict[str, Tensor]:
    tokens = torch.randint(1, VOCAB, (2, CONTEXT // 2), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def train(model: nn.Module, optimizers: Optimizers, steps: int, schedulers: Any = ()) -> None:
    for step in range(steps):
        model(**batch(step)).loss.backward()
        for part in (*optimizers, *schedulers):
            part.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def start(
    name: str = "adamw", arch: str = "llama", depth: int = 2, steps: int = 2
) -> tuple[PreTrainedModel, Optimizers]:
    model = tiny_model(arch, depth, dropout=0.0)
    optimizers = OPTIMIZERS[name](model)
    train(model, optimizers, steps)
    return model, optimizers


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# -- optimizers x moments x placements ----------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["stack", "front", "interleave"])
@pytest.mark.parametrize("moments", ["zero", "copy", "reset"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_old_state_is_untouched_and_new_state_is_as_declared(
    name: str, moments: Moments, placement: str
) -> None:
    model, optimizers = start(name)
    names = dict(model.named_parameters())
    groups = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
    before = {n: dict(entries) for n, entries in moments_of(model, optimizers).items()}
    plan = getattr(GrowthPlan, placement)(model, 4)
    new_names = renames(names, plan, family_of(model))

    report = aiether.grow(model, plan, optimizer=optimizers, moments=moments)

    assert isinstance(report, GrowthReport)
    grown = dict(model.named_parameters())
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in grown.values())
    after = moments_of(model, optimizers)
    group_of = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
    for old, (own, *made) in new_names.items():
        assert grown[own] is names[old]
        if moments == "reset" and name != "adagrad":
            assert own not in after
        elif moments != "reset":
            assert all(after[own][key] is value for key, value in before[old].items())
        for new in made:
            assert group_of[id(grown[new])] is groups[id(names[old])]
            entries = after.get(new, {})
            if moments == "copy":
                assert same(entries, before[old])
            elif name == "adagrad":
                assert set(torch.as_tensor(entries["sum"]).unique().tolist()) == {0.5}
            else:
                assert not any(torch.as_tensor(value).any() for value in entries.values())
    parts = {n: p.detach().clone() for n, p in grown.items()}
    train(model, optimizers, 1)
    assert not [n for n in report.new_tensors if torch.equal(parts[n], grown[n])]


@pytest.mark.parametrize("name", ["adamw", "muon beside adamw", "combined"])
@pytest.mark.parametrize("placement", ["front", "interleave"])
def test_an_optimizer_built_anew_over_the_grown_model_loads_the_state_by_position(
    name: str, placement: str
) -> None:
    model, optimizers = start(name)
    aiether.grow(model, getattr(GrowthPlan, placement)(model, 5), optimizer=optimizers, moments="copy")
    train(model, optimizers, 1)
    fresh = OPTIMIZERS[name](model)
    for new, old in zip(fresh, optimizers, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert same(moments_of(model, fresh), moments_of(model, optimizers))


@pytest.mark.parametrize("moments", ["zero", "copy", "reset"])
@pytest.mark.parametrize("init", ["geometric", "noise", "zero"])
def test_it_equals_the_migration_that_fit_carries_out(init: Any, moments: Moments) -> None:
    model, optimizers = start("adamw", "gpt2")
    trajectory = Trajectory(5)
    for step in range(4):
        train(model, optimizers, 1)
        trajectory.append(dict(model.named_parameters()), step)
    growth = GrowthConfig(init=init, moments=moments, scale="displacement", protocol="none")
    plan = GrowthPlan.front(model, 4, init=init)
    state = aiether.TrainingState(
        config=model.config.to_dict(),
        tensors=model.state_dict(),
        moments=copy.deepcopy(moments_of(model, optimizers)),
        step=7,
    )
    expected = aiether.migrate(state, plan, growth=growth, trajectory=trajectory, final_depth=4, seed=3).state
    reference = build_model(model, expected)

    aiether.grow(model, plan, optimizer=optimizers, trajectory=trajectory, growth=growth, seed=3, step=7)

    assert same(dict(model.state_dict()), dict(reference.state_dict()))
    assert same(moments_of(model, optimizers), expected.moments)
    assert model.config.to_dict() == reference.config.to_dict()
    assert len(trajectory) == 0


# -- one growth in detail -----------------------------------------------------------------------------------


def test_objects_modes_and_ties_are_kept_and_new_tensors_follow_their_source() -> None:
    model = tiny_model("gpt2", dropout=0.0)
    nn.Module.to(model, dtype=torch.bfloat16)
    container, config, inner = blocks(model), model.config, list(blocks(model))
    inner[1].attn.requires_grad_(False)  # type: ignore[union-attr]
    inner[1].eval()
    setattr(next(inner[0].parameters()), "no_decay", True)  # noqa: B010 - a mark, as optimizers read it
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, 10)
    train(model, [optimizer], 1, [scheduler])
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]

    aiether.grow(model, GrowthPlan.interleave(model, 4), optimizer=optimizer, scheduler=scheduler)

    grown = list(blocks(model))
    assert blocks(model) is container
    assert model.config is config
    assert grown[0] is inner[0]
    assert grown[2] is inner[1]
    assert optimizer.param_groups is groups
    assert all(now["params"] is then for now, then in zip(groups, lists, strict=True))
    head: Any = model.get_output_embeddings()
    assert model.get_input_embeddings().weight is head.weight
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert grown[1].training
    assert not any(module.training for module in grown[3].modules())
    assert [p.requires_grad for p in grown[3].parameters()] == [
        p.requires_grad for p in inner[1].parameters()
    ]
    held = {id(p) for p in groups[0]["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert next(grown[1].parameters()).no_decay  # type: ignore[attr-defined]
    assert grown[1].attn.config is config  # type: ignore[union-attr]


def test_hooks_stay_where_they_were_registered() -> None:
    model, optimizers = start()
    seen: list[int] = []
    source = blocks(model)[1]
    source.register_forward_hook(lambda *_: seen.append(1))
    source.mlp.register_full_backward_hook(lambda *_: seen.append(2))  # type: ignore[union-attr]
    report = aiether.grow(model, GrowthPlan.top(model, 4), optimizer=optimizers)
    train(model, optimizers, 1)
    assert sorted(seen) == [1, 2]
    assert any("4 hooks" in note for note in report.notes)


def test_named_groups_get_the_grown_names() -> None:
    model = tiny_model("llama")
    optimizer = AdamW([(f"net.{name}", p) for name, p in model.named_parameters()], lr=1e-3)
    aiether.grow(model, GrowthPlan.front(model, 3), optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [f"net.{name}" for name, _ in model.named_parameters()]


def test_a_group_in_an_order_of_its_own_keeps_it_and_other_modules_stay() -> None:
    model, head = tiny_model("llama"), nn.Linear(2, 2)
    mine = [head.weight, *reversed(list(model.parameters())), head.bias]
    optimizer = AdamW(mine, lr=1e-3)
    report = aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizer)
    params = optimizer.param_groups[0]["params"]
    assert params[0] is head.weight
    assert params[-1] is head.bias
    kept = [p for p in params if any(p is old for old in mine)]
    assert all(a is b for a, b in zip(kept, mine, strict=True))
    assert any("not this model's" in note for note in report.notes)
    assert any("not in the model's order" in note for note in report.notes)


@pytest.mark.parametrize("init", ["zero", "noise"])
def test_the_report_measures_the_batch_and_prints(init: Any) -> None:
    model, optimizers = start("adamw", "qwen3")
    model.train()
    with torch.no_grad():
        output = model.eval()(**batch())
        model.train()
    state = torch.get_rng_state()
    report = aiether.grow(
        model, GrowthPlan.stack(model, 4, init=init), optimizer=optimizers, batch=batch(), step=2
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert report.function is not None
    with torch.no_grad():
        after = model.eval()(**batch())
    gap = (after.logits - output.logits).square().sum(-1).mean()
    assert report.function.gap == pytest.approx(float(gap), abs=1e-12)
    assert (report.function.gap == 0) == (init == "zero")
    assert report.function.loss_before == pytest.approx(float(output.loss))
    assert report.function.loss_after == pytest.approx(float(after.loss))
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert set(report.tensor_metrics) == set(report.new_tensors)
    text = str(report)
    assert "2 -> 4 layers" in text
    assert "function gap" in text
    assert report.to_dict()["plan"]["depth_after"] == 4


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_the_report_says_where_geometric_became_a_copy(kept: int) -> None:
    model, optimizers = start()
    trajectory = Trajectory(5)
    for step in range(kept):
        train(model, optimizers, 1)
        trajectory.append(dict(model.named_parameters()), step)
    report = aiether.grow(
        model, GrowthPlan.top(model, 3, init="geometric"), optimizer=optimizers, trajectory=trajectory
    )
    notes = [note for note in report.notes if "give a trajectory" in note]
    assert len(notes) == (kept < 3)
    assert all(f"by copy: {kept} snapshots" in note for note in notes)


def test_a_report_without_an_optimizer_says_so() -> None:
    model = tiny_model("llama")
    assert "no optimizer was given" in str(aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None))


def test_several_growths_in_a_row_train_on() -> None:
    model, optimizers = start("combined")
    for depth in (3, 6, 7):
        aiether.grow(model, GrowthPlan.interleave(model, depth), optimizer=optimizers)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, optimizers, 1)
        assert not [name for name, p in model.named_parameters() if torch.equal(before[name], p)]
    assert model.config.num_hidden_layers == 7


# -- refusals -----------------------------------------------------------------------------------------------


def test_pending_gradients_are_refused() -> None:
    model, optimizers = start()
    model(**batch()).loss.backward()
    with pytest.raises(ValueError, match=r"zero_grad"):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)
    aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizers)


class SlowWeights(torch.optim.SGD):
    """Every second step it goes half-way back: its slow weights start where the tensor is, not at zero."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if "slow" not in state:
                state.update(slow=parameter.clone(), count=0)
            state["count"] += 1
            if state["count"] % 2 == 0:
                parameter.copy_(state["slow"].lerp_(parameter, 0.5))


def test_state_of_an_unknown_kind_starts_by_the_optimizers_own_rule() -> None:
    model = tiny_model("llama", dropout=0.0)
    optimizer = SlowWeights(model.parameters(), lr=1e-4)
    train(model, [optimizer], 2)
    report = aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizer, moments="zero")
    norms = [model.get_parameter(name).norm().item() for name in report.new_tensors]
    train(model, [optimizer], 2)
    after = [model.get_parameter(name).norm().item() for name in report.new_tensors]
    assert after == pytest.approx(norms, rel=1e-2)


class Hoarding(torch.optim.SGD):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=1e-3)
        self.own = AdamW(params, lr=1e-3)


class Listing(torch.optim.SGD):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=1e-3)
        self.by_group = [{"tensors": list(group["params"])} for group in self.param_groups]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda m: Listing(list(m.parameters())), "'by_group'"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "'_params'"),
        (lambda m: Hoarding(list(m.parameters())), "give the parts"),
        (lambda m: object(), "torch.optim.Optimizer"),
        (lambda m: AdamW(blocks(m).parameters()), "never train"),
        (lambda m: [AdamW(m.parameters()), AdamW(blocks(m).parameters())], "twice"),
    ],
)
def test_optimizers_that_would_go_wrong_are_refused(build: Callable[[nn.Module], Any], says: str) -> None:
    model = tiny_model("llama")
    with pytest.raises((ValueError, GrowthError), match=says):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=build(model))
    assert len(blocks(model)) == 2


def test_a_plan_for_another_depth_or_without_a_new_layer_is_refused() -> None:
    model, optimizers = start()
    with pytest.raises(ValueError, match="the plan is for 3 layers"):
        aiether.grow(model, GrowthPlan.stack(3, 6), optimizer=optimizers)
    with pytest.raises(ValueError, match="has 2 already"):
        GrowthPlan.stack(model, 2)


def test_what_is_no_plan_is_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"plan is 'stack': give a GrowthPlan"):
        aiether.grow(model, "stack", optimizer=None)  # type: ignore[arg-type]


def test_a_frozen_tensor_in_the_optimizer_stays_there_and_its_copy_joins_it() -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in blocks(model)[-1].parameters():
        parameter.requires_grad_(False)
    aiether.grow(model, GrowthPlan.stack(model, 2 * depth_of(model)), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
    assert [next(block.parameters()).requires_grad for block in blocks(model)] == [True, False, True, False]


def test_a_patched_forward_that_would_run_the_sources_weights_is_refused() -> None:
    model, optimizers = start()
    mlp: Any = blocks(model)[1].mlp
    original = mlp.forward
    mlp.forward = lambda hidden: original(hidden)
    with pytest.raises(ValueError, match="forward of its own"):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizers)


def test_hooks_that_step_in_the_backward_pass_are_refused() -> None:
    model, optimizers = start()
    parameter = next(blocks(model).parameters())
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="when its gradient is ready"):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizers)
