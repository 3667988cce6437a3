"""The silent failures of docs/silent-failures.md where a live model is grown in place: absent, or refused.

Numbers are those of that page. What a naive loop does is shown in `test_silent_failures.py`; here it stands
beside ours where the way differs.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from transformers import AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

import aiether
from aiether import GrowthError, GrowthPlan
from aiether.integrations._grow_optimizer import moments_of

from .test_grow import batch, same, train
from .tiny import AtStep, append_copy, blocks, tiny_model, tiny_trainer, values


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2)


def trained(arch: str = "llama") -> tuple[PreTrainedModel, AdamW]:
    model = tiny_model(arch, dropout=0.0)
    optimizer = adamw(model)
    train(model, [optimizer], 2)
    return model, optimizer


# -- plain PyTorch ------------------------------------------------------------------------------------------


def test_01_02_and_11_a_saved_state_finds_its_tensors_in_a_fresh_optimizer() -> None:
    def reload(model: PreTrainedModel, optimizer: Optimizer) -> bool:
        fresh = adamw(model)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # by position, without an error
        return same(moments_of(model, [fresh]), moments_of(model, [optimizer]))

    naive, optimizer = trained()
    append_copy(naive)
    optimizer.param_groups[0]["params"] += list(blocks(naive)[-1].parameters())
    train(naive, [optimizer], 1)
    assert not reload(naive, optimizer)

    model, optimizer = trained()
    aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizer)
    train(model, [optimizer], 1)
    assert reload(model, optimizer)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: get_cosine_schedule_with_warmup(o, 2, 12),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=12),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_03_schedules_go_on_as_if_nothing_had_happened(name: str) -> None:
    def rates(grows: bool) -> list[list[float]]:
        model = tiny_model("llama")
        groups = [{"params": [p], "lr": 1e-2 * (1 + p.ndim)} for p in model.parameters()]
        optimizer = SGD(groups, momentum=0.9)
        schedule = SCHEDULES[name](optimizer)
        seen = []
        for step in range(10):
            optimizer.step()
            schedule.step(*((1.0,) if name == "plateau" else ()))
            seen.append([group["lr"] for group in optimizer.param_groups])
            if grows and step == 4:
                aiether.grow(model, GrowthPlan.front(model, 4), optimizer=optimizer, scheduler=schedule)
                state = copy.deepcopy(schedule.state_dict())
                schedule.load_state_dict(state)
        return seen

    assert rates(grows=True) == rates(grows=False)


def two_ranks(work: Callable[[int, Any], None], tmp_path: Path) -> list[Any]:
    """Run `work(rank, queue)` in two processes of one gloo group; what they put, by rank."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
        try:
            work(rank, queue)
        finally:
            dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [value for _, value in sorted(queue.get() for _ in processes)]


def ddp_steps(model: nn.Module, optimizer: Optimizer, rank: int, steps: int) -> None:
    for step in range(steps):
        model(**batch(10 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def checksums(model: PreTrainedModel) -> list[float]:
    return [float(p.double().sum()) for p in model.parameters()]


def test_04_ddp_is_refused_and_wrapping_again_keeps_the_ranks_equal(tmp_path: Path) -> None:
    def naive(rank: int, queue: Any) -> None:
        model = tiny_model("llama", dropout=0.0)
        wrapped, optimizer = DistributedDataParallel(model), adamw(model)
        ddp_steps(wrapped, optimizer, rank, 1)
        append_copy(model)
        optimizer.param_groups[0]["params"] += list(blocks(model)[-1].parameters())
        ddp_steps(wrapped, optimizer, rank, 2)
        queue.put((rank, checksums(model)))

    def ours(rank: int, queue: Any) -> None:
        model = tiny_model("llama", dropout=0.0)
        wrapped, optimizer = DistributedDataParallel(model), adamw(model)
        ddp_steps(wrapped, optimizer, rank, 1)
        plan = GrowthPlan.stack(model, 4, init="noise")
        try:
            aiether.grow(wrapped, plan, optimizer=optimizer)
            says = ""
        except ValueError as error:
            says = str(error)
        report = aiether.grow(model, plan, optimizer=optimizer, seed=1)
        ddp_steps(DistributedDataParallel(model), optimizer, rank, 2)
        queue.put((rank, (says, "wrap the model again" in str(report), checksums(model))))

    (tmp_path / "naive").mkdir()
    first, second = two_ranks(naive, tmp_path / "naive")
    assert first != second, "DistributedDataParallel has begun to see layers that come later"
    first, second = two_ranks(ours, tmp_path)
    assert "grow model.module" in first[0]
    assert first[1]
    assert first == second


# -- Hugging Face models ------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(batch()["input_ids"]).logits


def test_05_the_configuration_knows_every_layer_and_a_model_that_disagrees_is_refused() -> None:
    model, optimizer = trained()
    aiether.grow(model, GrowthPlan.top(model, 3), optimizer=optimizer)
    before = logits(model)
    with torch.no_grad():
        for parameter in blocks(model)[2].parameters():
            parameter.zero_()
    assert not torch.equal(logits(model), before)

    naive, optimizer = trained()
    append_copy(naive, tell_config=False)
    with pytest.raises(ValueError, match="states 2 layers, the model has 3"):
        aiether.grow(naive, GrowthPlan.top(2, 4), optimizer=None)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
def test_06_generation_with_a_cache_equals_without(arch: str) -> None:
    model, optimizer = trained(arch)
    aiether.grow(model, GrowthPlan.interleave(model, 5, init="noise"), optimizer=optimizer)

    def continued(use_cache: bool) -> torch.Tensor:
        ids = batch()["input_ids"][:, :4]
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        return model.eval().generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, pad_token_id=0, **settings
        )

    assert torch.equal(continued(True), continued(False))
    naive, _ = trained(arch)
    append_copy(naive)
    with pytest.raises(ValueError, match="layer_idx"):
        aiether.grow(naive, GrowthPlan.top(naive, 4), optimizer=None)


def test_07_lists_with_one_entry_a_layer_move_with_the_layers(tmp_path: Path) -> None:
    model, optimizer = trained("qwen3")
    aiether.grow(model, GrowthPlan.interleave(model, 4), optimizer=optimizer)
    types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.layer_types == types
    assert [block.self_attn.layer_type for block in blocks(model)] == types  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# -- Hugging Face Trainer -----------------------------------------------------------------------------------


def test_08_09_and_11_a_bare_trainer_trains_what_a_callback_grows_in_place_and_resumes(
    tmp_path: Path,
) -> None:
    born: dict[str, torch.Tensor] = {}

    def grow(model: PreTrainedModel, optimizer: Any) -> None:
        report = aiether.grow(model, GrowthPlan.front(model, 3), optimizer=optimizer)
        assert len(report.groups) == 2
        born.update(
            {name: dict(model.named_parameters())[name].detach().clone() for name in report.new_tensors}
        )

    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 4, "eval_strategy": "no", "weight_decay": 0.1}
    whole = tiny_trainer(tmp_path / "whole", tiny_model("llama"), callbacks=[AtStep(2, grow)], **settings)
    whole.train()
    assert whole.model is not None
    end = dict(whole.model.named_parameters())
    assert not [name for name, value in born.items() if torch.equal(end[name], value)]

    checkpoint = tmp_path / "whole" / "run" / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attention_dropout=0.1)
    resumed = tiny_trainer(tmp_path / "resumed", model, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.model is not None
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_10_growing_between_two_train_calls_trains_the_new_layers(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_model(), max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.train()
    model: Any = trainer.model
    aiether.grow(
        model, GrowthPlan.stack(model, 4), optimizer=trainer.optimizer, scheduler=trainer.lr_scheduler
    )
    before = values(model)
    for group in trainer.optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = 1e-3  # the schedule of the first call has run out
    trainer.lr_scheduler = None
    trainer.train()
    assert not [name for name, p in model.named_parameters() if torch.equal(before[name], p)]


def test_12_what_is_frozen_stays_frozen_and_out_and_a_later_thaw_is_noticed() -> None:
    model = tiny_model()
    blocks(model)[0].requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, [optimizer], 1)
    aiether.grow(model, GrowthPlan.interleave(model, 4), optimizer=optimizer)
    assert not any(p.requires_grad for p in blocks(model)[1].parameters())
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    model.requires_grad_(True)
    with pytest.raises(GrowthError, match="never train"):
        aiether.grow(model, GrowthPlan.top(model, 5), optimizer=optimizer)


# -- other wrappers -----------------------------------------------------------------------------------------


class DeepSpeedEngine(nn.Module):
    """Of the name alone: the library is not installed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (DataParallel, "wrap it again in DataParallel"),
        (DeepSpeedEngine, "initialise the engine anew"),
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
    ],
)
def test_14_to_22_wrapped_models_are_refused_with_the_remedy(wrap: Callable[..., Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        aiether.grow(wrap(tiny_model("llama")), GrowthPlan.top(2, 3), optimizer=None)


def test_14_to_19_a_sharded_model_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        mesh = init_device_mesh("cpu", (1,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        with pytest.raises(ValueError, match="call fully_shard on the grown model"):
            aiether.grow(model, GrowthPlan.top(2, 3), optimizer=None)
    finally:
        dist.destroy_process_group()


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(ValueError, match="load the model whole"):
        aiether.grow(model, GrowthPlan.top(2, 3), optimizer=None)


# -- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def test_22_compiled_blocks_stay_compiled_and_growths_make_no_new_graph(graphs: CompileCounter) -> None:
    model = tiny_model("llama", dropout=0.0)
    optimizer = adamw(model)
    for block in blocks(model):
        block.compile(backend=graphs)
    train(model, [optimizer], 1)
    counts = {graphs.frame_count}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        for depth in range(3, 12):
            aiether.grow(
                model,
                GrowthPlan.front(model, depth),
                optimizer=optimizer,
                batch=batch(),
                compile_block=lambda block: block.compile(backend=graphs),
            )
            train(model, [optimizer], 1)
            counts.add(graphs.frame_count)
    assert all(block._compiled_call_impl is not None for block in blocks(model))
    assert counts == {1}


@pytest.mark.parametrize("path", ["", "model"])
def test_22_a_model_compiled_as_a_whole_is_refused(path: str) -> None:
    model = tiny_model("llama")
    model.get_submodule(path).compile(backend="eager")
    with pytest.raises(ValueError, match="compile each block"):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)


@pytest.mark.parametrize("path", ["", "model"])
def test_22_a_forward_that_was_compiled_as_a_whole_is_refused(path: str) -> None:
    model = tiny_model("llama")
    module: Any = model.get_submodule(path)
    plain = module.forward
    for compiled in (
        torch.compile(plain, backend="eager"),
        torch.no_grad()(torch.compile(plain, backend="eager")),
    ):
        module.forward = compiled
        with pytest.raises(ValueError, match=r"del .*forward.*block.compile\(\)"):
            aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)
    module.forward = torch.compiler.disable(plain)  # the contrary of compiled
    aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)
    assert len(blocks(model)) == 3


def test_22_a_forward_that_its_class_compiles_is_refused() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        @torch.compile(backend="eager")
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for block in self.trunk:
                hidden = block(hidden)
            return hidden

    model = Compiled()
    with pytest.raises(ValueError, match=r"remove torch\.compile from Compiled\.forward"):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)


@pytest.mark.parametrize("given", [False, True])
def test_the_report_says_when_blocks_were_compiled_anew_with_default_settings(given: bool) -> None:
    model = tiny_model("llama", dropout=0.0)
    for block in blocks(model):
        block.compile(backend="eager", dynamic=True)
    mine: Any = {"compile_block": lambda block: block.compile(backend="eager", dynamic=True)} if given else {}
    report = aiether.grow(model, GrowthPlan.top(model, 4), optimizer=None, **mine)
    assert any("compile_block=" in note for note in report.notes) != given
    again = aiether.grow(tiny_model("llama"), GrowthPlan.top(2, 4), optimizer=None)
    assert not any("compile_block=" in note for note in again.notes)


def test_24_compiled_blocks_with_the_generation_cache_are_refused() -> None:
    model = tiny_model("llama")
    blocks(model)[0].compile(backend="eager")
    model.config.use_cache = True
    with pytest.raises(ValueError, match="use_cache = False"):
        aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)
