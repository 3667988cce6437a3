"""What a run needs at its largest planned depth, and what happens when memory runs out all the same."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel, Trainer

from aiether.integrations import CheckpointStore, FitResult, OutOfMemory, Workload, check_memory, fit
from aiether.integrations._memory import container_free, fits, measured_activations, memory_need

from .test_fit import Watch, assert_same, growth, weights
from .tiny import CONTEXT, tiny_model, tiny_trainer

CPU = torch.device("cpu")
WORK = Workload(batch_size=3, context_length=CONTEXT, accumulation=1, moments_per_weight=2, bf16=False)


def kept_by_autograd(model: PreTrainedModel, work: Workload) -> int:
    """Bytes that a real forward pass of a whole batch keeps, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(work.batch_size, work.context_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_estimate_at_another_depth_and_batch_is_what_a_real_pass_keeps(arch: str) -> None:
    before = torch.get_rng_state()
    estimate = measured_activations(tiny_model(arch, depth=2), 5, WORK)
    assert estimate == pytest.approx(kept_by_autograd(tiny_model(arch, depth=5), WORK), rel=0.06)
    torch.set_rng_state(before)


def test_weights_moments_and_window_are_those_of_the_largest_depth() -> None:
    config = growth(trigger="geometric", watch="all", max_layers=6, history_window_size=4)
    need = memory_need(tiny_model(depth=2), config, WORK, CPU)
    large = tiny_model(depth=6)
    assert need.depth == 6
    assert need.weights == sum(p.nbytes for p in large.parameters())
    assert need.moments == 2 * need.weights
    blocks = large.get_submodule("transformer.h")
    assert need.window == 4 * sum(p.nbytes for p in blocks.parameters())


def test_a_depth_that_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    layers = psutil.virtual_memory().total // 10_000
    with pytest.raises(ValueError, match=f"largest planned depth, {layers} layers, needs at least") as no:
        fit(tiny_trainer(tmp_path), growth(max_layers=layers))
    assert "\n" not in str(no.value)
    assert "batch size of 2 with gradient_accumulation_steps=2" in str(no.value)
    assert "a smaller max_layers" in str(no.value)
    assert list((tmp_path / "run").iterdir()) == []  # made by the Trainer


def test_activations_alone_can_be_too_much() -> None:
    work = Workload(
        batch_size=psutil.virtual_memory().total // 20_000,
        context_length=CONTEXT,
        accumulation=1,
        moments_per_weight=2,
        bf16=False,
    )
    with pytest.raises(ValueError, match="activations"):
        check_memory(tiny_model(), growth(), work, CPU)


def test_a_probe_of_the_last_growth_holds_the_run_beside_the_fork() -> None:
    config = growth(trigger="lag", grow_to=(3, 6), max_layers=6)
    need = memory_need(tiny_model(depth=2), config, WORK, CPU)
    without = memory_need(tiny_model(depth=2), growth(grow_to=(3, 6), max_layers=6), WORK, CPU)
    waiting = sum(p.nbytes for p in tiny_model(depth=3).parameters())
    assert need.beside == 3 * waiting
    assert need.total - need.beside == without.total
    assert "the run beside its forks" in str(need)
    assert "beside" not in str(without)


def test_the_trial_finds_out_whether_the_largest_depth_fits() -> None:
    """The trial that a GPU gets, here under a real limit of this process's address space."""
    model, config = tiny_model(), growth(max_layers=8)
    state = torch.get_rng_state()
    need = memory_need(model, config, WORK, CPU)
    assert fits(model, config, WORK, CPU, need)
    large = replace(WORK, batch_size=20_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (64 << 20), hard))
    try:
        assert not fits(model, config, large, CPU, need)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_containers_limit_counts_without_its_cache(tmp_path: Path) -> None:
    assert container_free(tmp_path) > 1 << 60
    for name, text in {"max": "1000\n", "current": "900\n", "stat": "anon 100\nfile 700\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert container_free(tmp_path) == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert container_free(tmp_path) > 1 << 60


STEPS = 12


def trainer(folder: Path, fails_at: int | None = None, *, training: bool = True) -> Trainer:
    """A Trainer whose forward pass asks, once, for more memory than there is."""
    made = tiny_trainer(folder, max_steps=STEPS, save_steps=5, eval_steps=4, logging_steps=1)
    step_of = type(made).compute_loss

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == fails_at and model.training == training:
            torch.empty(1 << 47)
        return step_of(self, model, *args, **kwargs)

    made.compute_loss = compute_loss.__get__(made)  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, Watch]:
    watch = Watch()
    return fit(trainer(tmp_path_factory.mktemp("whole")), growth(), observers=[watch]), watch


@pytest.mark.parametrize(("step", "training"), [(7, True), (8, False)], ids=["a step", "an evaluation"])
def test_running_out_in_the_middle_saves_first_and_says_what_to_lower(
    undisturbed: tuple[FitResult, Watch], tmp_path: Path, step: int, training: bool
) -> None:
    (expected, whole), config = undisturbed, growth()
    first, second = Watch(), Watch()
    where = "step 8" if training else "the evaluation at step 8"
    with pytest.raises(OutOfMemory, match=f"^{where} with 8 layers ran out of memory") as fault:
        fit(trainer(tmp_path, step, training=training), config, observers=[first])
    said = str(fault.value)
    assert "\n" not in said
    assert (
        "batch size of 2 with gradient_accumulation_steps=2 (the same tokens per step), or bf16, or" in said
    )
    newest = CheckpointStore(tmp_path / "run").latest()
    assert newest is not None
    assert newest.step == step
    assert f"the newest complete checkpoint is {newest.path}" in said
    assert_same(weights(expected), weights(fit(trainer(tmp_path), config, resume=True, observers=[second])))
    losses = [[row["eval_loss"] for row in watch.evaluations] for watch in (whole, first, second)]
    assert losses[0] == losses[1] + losses[2]
