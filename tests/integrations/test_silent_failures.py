"""Ways in which changing a model in mid-training fails silently, each beside the path that does not.

The numbers are those of `docs/silent-failures.md`. Every test first takes the naive way, with real models and
a real Trainer, and pins what goes wrong there: should a new release of a library repair it, the test says so
by failing in its first half.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from aiether import FitResult, GrowthConfig, GrowthError, RunObserver, fit
from aiether.growth import GrowthController, GrowthPlan, block_tensors, family_of
from aiether.integrations import GrowthCallback
from aiether.integrations._checkpoint import CheckpointStore, Moments
from aiether.integrations._model import compile_blocks, grow_model
from aiether.integrations._optimizer_state import capture_moments, load_moments

from .tiny import CONTEXT, VOCAB, AtStep, append_copy, blocks, tiny_model, tiny_trainer, unchanged, values


def growth(**settings: Any) -> GrowthConfig:
    """One growth by one layer in front, at half of the run."""
    plain: dict[str, Any] = {
        "trigger": "fixed",
        "growth_fractions": (0.5,),
        "placement": "front",
        "grow_by": 1,
        "init": "copy",
        "protocol": "none",
        "warmup_steps": 0,
    }
    return GrowthConfig(**{**plain, **settings})


NEVER = growth(trigger="never")


def trainer_of(tmp_path: Path, model: PreTrainedModel, **settings: Any) -> Trainer:
    quick = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
    return tiny_trainer(tmp_path, model, **{**quick, **settings})


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that every layer has a say in the next token."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, VOCAB, (2, CONTEXT // 2), generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(batch()).logits


def wrong_moments(model: nn.Module, optimizer: torch.optim.Optimizer, expected: Moments) -> list[str]:
    """Names of the parameters that hold other moments than theirs."""
    actual = capture_moments(model, optimizer)
    assert actual.keys() == expected.keys()
    return [
        name
        for name, entries in expected.items()
        if not torch.equal(torch.as_tensor(actual[name]["exp_avg"]), torch.as_tensor(entries["exp_avg"]))
    ]


class BeforeAndAfter(RunObserver):
    """Keeps the weights at every stage's start, and every event and training row."""

    def __init__(self) -> None:
        self.at_stage: list[dict[str, torch.Tensor]] = []
        self.rows: list[dict[str, Any]] = []

    def on_stage(self, *, stage: int, step: int, model: PreTrainedModel, lineage: Any) -> None:
        self.at_stage.append(values(model))

    def on_log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def assert_new_layers_trained(result: FitResult, watch: BeforeAndAfter, layers: tuple[int, ...]) -> None:
    start, end = watch.at_stage[-1], result.model.state_dict()
    tensors = block_tensors(end, family_of(result.model))
    assert result.depth == len(tensors)
    for layer in layers:
        still = [name for name in tensors[layer].values() if torch.equal(start[name], end[name])]
        assert not still


def stepped(model: PreTrainedModel, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """An AdamW with one step of moments."""
    optimizer = torch.optim.AdamW(parameters)
    model(batch(), labels=batch()).loss.backward()
    optimizer.step()
    return optimizer


# -- plain PyTorch ------------------------------------------------------------------------------------------


def test_01_moments_loaded_by_position_go_to_other_tensors() -> None:
    model = tiny_model("llama")
    named = dict(model.named_parameters())
    saved = stepped(model, list(named.values()))
    right = capture_moments(model, saved)

    naive = torch.optim.AdamW(reversed(list(named.values())))
    naive.load_state_dict(saved.state_dict())  # no error
    wrong = wrong_moments(model, naive, right)
    assert len(wrong) > len(named) // 2
    misshapen = [name for name in wrong if naive.state[named[name]]["exp_avg"].shape != named[name].shape]
    assert misshapen, "torch has begun to look at shapes"

    ours = torch.optim.AdamW(reversed(list(named.values())))
    load_moments(model, ours, right)
    assert not wrong_moments(model, ours, right)


def test_02_another_count_of_tensors_has_no_way_in_for_a_positional_state() -> None:
    small, large = tiny_model("llama", 2), tiny_model("llama", 3)
    saved = stepped(small, list(small.parameters()))
    naive = torch.optim.AdamW(large.parameters())
    with pytest.raises(ValueError, match="doesn't match the size"):  # loud, but with no way on
        naive.load_state_dict(saved.state_dict())

    moments = capture_moments(small, saved)
    load_moments(large, naive, moments)
    assert capture_moments(large, naive).keys() == moments.keys()
    with pytest.raises(ValueError, match="another architecture"):
        load_moments(small, saved, capture_moments(large, stepped(large, list(large.parameters()))))


def test_03_groups_added_to_a_scheduled_optimizer_run_at_another_rate(tmp_path: Path) -> None:
    def cosine(model: PreTrainedModel) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)

    optimizer, schedule = cosine(tiny_model())
    rates = [1e-2]
    for step in range(1, 8):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        if step == 4:
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert optimizer.param_groups[1]["lr"] > 2 * rates[-1], "torch has begun to schedule added groups alike"

    model, watch = tiny_model(), BeforeAndAfter()
    trainer = trainer_of(tmp_path, model, max_steps=8, logging_steps=1, optimizers=cosine(model))
    result = fit(trainer, growth(), observers=[watch])
    assert result.num_growths == 1
    assert [row["learning_rate"] for row in watch.rows] == pytest.approx(rates)
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1  # type: ignore[union-attr]


# -- Hugging Face models ------------------------------------------------------------------------------------


def test_05_an_appended_layer_is_ignored_until_the_configuration_knows_it(tmp_path: Path) -> None:
    naive = tiny_model("llama")
    before = logits(naive)
    append_copy(naive, tell_config=False)
    assert torch.equal(logits(naive), before)
    with pytest.raises(ValueError, match="states 2 layers, the model has 3"):
        fit(trainer_of(tmp_path, naive), NEVER)

    result = fit(trainer_of(tmp_path, tiny_model("llama")), growth())
    assert result.model.config.num_hidden_layers == len(blocks(result.model)) == 3
    after = logits(result.model)
    with torch.no_grad():
        for parameter in blocks(result.model)[0].parameters():
            parameter.zero_()
    assert not torch.equal(logits(result.model), after)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_06_copied_layer_indices_corrupt_generation_with_a_cache(tmp_path: Path, arch: str) -> None:
    def continued(model: PreTrainedModel, *, use_cache: bool) -> torch.Tensor:
        ids = batch()[:, :4]
        text: Any = model.eval().generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
        return text

    naive = shaken(tiny_model(arch))
    append_copy(naive)
    assert not torch.equal(continued(naive, use_cache=True), continued(naive, use_cache=False))
    with pytest.raises(ValueError, match="layer_idx"):
        fit(trainer_of(tmp_path, naive), NEVER)

    grown = fit(trainer_of(tmp_path, shaken(tiny_model(arch))), growth()).model
    assert grown.config.num_hidden_layers == 3
    assert torch.equal(continued(grown, use_cache=True), continued(grown, use_cache=False))


def test_07_lists_with_one_entry_a_layer_go_stale(tmp_path: Path) -> None:
    naive = tiny_model("qwen3")
    append_copy(naive)
    with pytest.raises(IndexError):
        logits(naive)
    with pytest.raises(Exception, match="layer_types"):
        naive.save_pretrained(tmp_path / "naive")
    # Lengthening the list at its end repairs both errors, and gives a layer that was inserted in front ...
    stacked = tiny_model("qwen3")
    blocks(stacked).insert(0, copy.deepcopy(blocks(stacked)[0]))
    stacked.config.num_hidden_layers = 3
    stacked.config.layer_types = [*stacked.config.layer_types, "full_attention"]
    logits(stacked)
    assert blocks(stacked)[1].self_attn.layer_type == "full_attention"  # type: ignore[union-attr]
    assert stacked.config.layer_types[1] == "sliding_attention"  # ... another layer's mask, silently

    result = fit(trainer_of(tmp_path, tiny_model("qwen3")), growth())
    types = ["full_attention", "full_attention", "sliding_attention"]
    assert result.model.config.layer_types == types
    assert [block.self_attn.layer_type for block in blocks(result.model)] == types  # type: ignore[union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert torch.equal(logits(loaded), logits(result.model))


# -- Hugging Face Trainer -----------------------------------------------------------------------------------


def test_08_a_model_swapped_in_a_callback_never_trains(tmp_path: Path) -> None:
    large = tiny_model(depth=3)
    before = values(large)
    trainer = trainer_of(tmp_path, tiny_model())

    def swap(model: nn.Module, optimizer: Any) -> None:
        trainer.model = trainer.model_wrapped = large

    trainer.add_callback(AtStep(2, swap))
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.model is large
    assert unchanged(large, before)

    watch = BeforeAndAfter()
    result = fit(trainer_of(tmp_path, tiny_model(), max_steps=8), growth(), observers=[watch])
    assert_new_layers_trained(result, watch, (0, 1, 2))


def test_09_a_layer_grown_in_a_callback_never_trains_and_is_lost_on_resume(tmp_path: Path) -> None:
    def grow(model: PreTrainedModel, optimizer: Any) -> None:
        append_copy(model)
        born.update(values(blocks(model)[-1]))

    born: dict[str, torch.Tensor] = {}
    naive = trainer_of(tmp_path, tiny_model("llama"), save_strategy="steps", save_steps=4)
    naive.add_callback(AtStep(2, grow))
    naive.train()
    assert naive.model is not None
    assert unchanged(blocks(naive.model)[-1], born)
    resumed = trainer_of(tmp_path, tiny_model("llama"), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))  # a warning, no error
    assert resumed.model is not None
    assert (resumed.state.global_step, len(blocks(resumed.model))) == (6, 2)

    under_fit = trainer_of(tmp_path / "callback", tiny_model("llama"), callbacks=[AtStep(2, grow)])
    with pytest.raises(ValueError, match="the model has 3 layers, the controller counts 2"):
        fit(under_fit, NEVER)

    whole = fit(trainer_of(tmp_path / "whole", tiny_model("llama"), max_steps=8), growth())
    crashing = trainer_of(tmp_path / "cut", tiny_model("llama"), max_steps=8)
    crashing.add_callback(AtStep(6, crash))
    with pytest.raises(RuntimeError, match="crash"):
        fit(crashing, growth())
    again = fit(trainer_of(tmp_path / "cut", tiny_model("llama"), max_steps=8), growth(), resume=True)
    assert (again.step, again.depth) == (8, 3)
    assert unchanged(again.model, whole.model.state_dict())


def crash(model: nn.Module, optimizer: Any) -> None:
    raise RuntimeError("crash")


def test_10_growing_between_two_train_calls_trains_the_old_model_or_nothing(tmp_path: Path) -> None:
    in_place = trainer_of(tmp_path, tiny_model(), max_steps=2)
    in_place.train()
    assert isinstance(in_place.model, PreTrainedModel)
    append_copy(in_place.model)
    born = values(blocks(in_place.model)[-1])
    in_place.train()
    assert unchanged(blocks(in_place.model)[-1], born)
    assert in_place.state.global_step == 2, "the step count starts over"

    for names in (("model",), ("model", "model_wrapped")):
        trainer, large = trainer_of(tmp_path, tiny_model(), max_steps=2), tiny_model(depth=3)
        trainer.train()
        small, before = trainer.model, values(large)
        assert small is not None
        trained = values(small)
        for name in names:
            setattr(trainer, name, large)
        trainer.train()
        assert unchanged(large, before)
        assert unchanged(small, trained) == (len(names) == 2)  # the old model trains on, or nothing does

    with pytest.raises(ValueError, match="trained before"):
        fit(in_place, growth())

    watch = BeforeAndAfter()
    trainer = trainer_of(tmp_path, tiny_model(), max_steps=8, logging_steps=1)
    result = fit(trainer, growth(), observers=[watch])
    assert [row["step"] for row in watch.rows] == list(range(1, 9))
    assert_new_layers_trained(result, watch, (0, 1, 2))


def test_11_parameters_added_to_a_live_optimizer_are_misassigned_on_resume(tmp_path: Path) -> None:
    def grow(model: PreTrainedModel, optimizer: Any) -> None:
        append_copy(model)
        for group in optimizer.param_groups:
            matrices = group["weight_decay"] > 0
            group["params"] += [p for p in blocks(model)[-1].parameters() if (p.ndim > 1) == matrices]

    settings = {"save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1}
    naive = trainer_of(tmp_path, tiny_model("llama"), **settings)
    naive.add_callback(AtStep(2, grow))
    naive.train()
    assert naive.model is not None
    optimizer: Any = naive.optimizer
    right = capture_moments(naive.model, optimizer.optimizer)  # it trains, all of it
    fresh = trainer_of(tmp_path, tiny_model("llama", 3), **settings)
    assert fresh.model is not None
    fresh.create_optimizer()
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    fresh.optimizer.load_state_dict(state)  # type: ignore[union-attr]  # no error
    assert wrong_moments(fresh.model, fresh.optimizer, right)  # type: ignore[arg-type]

    def last(folder: Path) -> Moments:
        checkpoint = CheckpointStore(folder / "run").latest()
        assert checkpoint is not None
        return checkpoint.read_moments()

    fit(trainer_of(tmp_path / "whole", tiny_model("llama"), max_steps=6), growth())
    crashing = trainer_of(tmp_path / "cut", tiny_model("llama"), max_steps=6)
    crashing.add_callback(AtStep(5, crash))
    with pytest.raises(RuntimeError, match="crash"):
        fit(crashing, growth())
    fit(trainer_of(tmp_path / "cut", tiny_model("llama"), max_steps=6), growth(), resume=True)
    expected, actual = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert expected.keys() == actual.keys() == {name for name, _ in tiny_model("llama", 3).named_parameters()}
    for name, entries in expected.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(actual[name][key]), torch.as_tensor(value)), (name, key)


def test_12_what_is_unfrozen_after_the_optimizer_was_built_never_trains(tmp_path: Path) -> None:
    def frozen_start() -> PreTrainedModel:
        model = tiny_model()
        blocks(model)[0].requires_grad_(False)
        return model

    unfreeze = AtStep(2, lambda model, optimizer: model.requires_grad_(True))
    model = frozen_start()
    before = values(blocks(model)[0])
    naive = trainer_of(tmp_path, model, callbacks=[unfreeze])
    naive.train()
    assert all(p.requires_grad for p in model.parameters())
    assert unchanged(blocks(model)[0], before)
    with pytest.raises(GrowthError, match="not in the optimizer"):
        fit(trainer_of(tmp_path / "callback", frozen_start(), callbacks=[unfreeze]), NEVER)

    watch = BeforeAndAfter()
    isolated = growth(protocol="report", isolated_warmup_steps=2, growth_fractions=(0.25,))
    result = fit(trainer_of(tmp_path / "fit", tiny_model(), max_steps=8), isolated, observers=[watch])
    _, isolated_start, free_start = watch.at_stage
    old = [name for name in free_start if not name.startswith("transformer.h.0.")]
    assert all(torch.equal(isolated_start[name], free_start[name]) for name in old)
    end = result.model.state_dict()
    assert not [name for name in old if torch.equal(free_start[name], end[name])]


# -- Accelerate and several devices: refused -----------------------------------------------------------------


def test_13_a_copy_of_a_prepared_model_counts_as_prepared(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model(), max_steps=1)
    trainer.train()
    assert trainer.model is not None
    trainer.accelerator.free_memory()
    naive: Any = copy.deepcopy(trainer.model)
    assert naive._is_accelerate_prepared, "the mark no longer survives free_memory() and a copy"
    assert trainer.accelerator.prepare(naive) is naive

    family = family_of(naive)
    controller = GrowthController(growth(), family, depth=2, total_steps=4, seed=0, final_depth=3)
    ours = grow_model(naive, {}, controller, GrowthPlan.front(2, 3), step=1).model
    assert not getattr(ours, "_is_accelerate_prepared", False)


@pytest.mark.parametrize(
    ("attribute", "says"),
    [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed"), ("is_model_parallel", "device_map")],
)
def test_14_to_21_a_sharded_model_is_refused(tmp_path: Path, attribute: str, says: str) -> None:
    trainer = trainer_of(tmp_path, tiny_model())
    assert getattr(trainer, attribute) is False, f"the Trainer no longer tells by {attribute}"
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=says):
        fit(trainer, growth())


@pytest.mark.parametrize("attribute", ["world_size", "n_gpu"])
def test_04_and_15_several_processes_or_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    trainer = trainer_of(tmp_path, tiny_model())
    assert getattr(trainer.args, attribute) <= 1
    monkeypatch.setattr(TrainingArguments, attribute, property(lambda self: 2))
    with pytest.raises(ValueError, match="one device"):
        fit(trainer, growth())
    trainer.add_callback(GrowthCallback(growth()))
    with pytest.raises(ValueError, match="one device"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


# -- torch.compile -------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts the graphs of everything compiled in the test; the dynamo is reset around it."""
    torch._dynamo.reset()
    counter = CompileCounter()
    honest = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: honest(module, backend=counter))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield counter
    torch._dynamo.reset()


def test_22_a_whole_compiled_model_falls_back_to_eager_after_a_few_growths(
    tmp_path: Path, graphs: CompileCounter
) -> None:
    with torch._dynamo.config.patch(recompile_limit=2):  # 8 in earnest
        counts = []
        for depth in (1, 2, 3):
            model = tiny_model("llama", depth)
            model.compile()
            logits(model)  # never an error
            counts.append(graphs.frame_count)
    assert counts == [1, 2, 2], "the third depth ran in eager mode"
    with pytest.raises(ValueError, match="compile=True"):
        fit(trainer_of(tmp_path, tiny_model(), torch_compile=True), growth())

    torch._dynamo.reset()
    graphs.frame_count = 0
    with torch._dynamo.config.patch(recompile_limit=1):
        for depth in (1, 2, 3):
            model = tiny_model("llama", depth)
            compile_blocks(model, family_of(model))
            logits(model)
        assert graphs.frame_count == 1
        with pytest.raises(FailOnRecompileLimitHit):
            model(batch().repeat(2, 1))  # a second graph: ours raises where torch would warn


def test_24_the_cache_makes_every_compiled_block_a_graph_of_its_own(
    tmp_path: Path, graphs: CompileCounter
) -> None:
    def run(*, use_cache: bool) -> int:
        torch._dynamo.reset()
        graphs.frame_count = 0
        model = tiny_model("llama", 4)
        model.config.use_cache = use_cache
        for block in blocks(model):
            block.compile()
        logits(model)
        return graphs.frame_count

    with torch._dynamo.config.patch(recompile_limit=3):
        assert run(use_cache=True) == 3, "one graph a layer, and the fourth layer in eager mode"
    assert run(use_cache=False) == 1

    with pytest.raises(ValueError, match="use_cache=False"):
        fit(trainer_of(tmp_path, tiny_model("llama"), use_cache=True), growth(), compile=True)
