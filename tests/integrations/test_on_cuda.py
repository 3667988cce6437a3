"""What only a GPU can show: CUDA graphs change nothing, and the memory of a real device is found out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from aiether import GrowthConfig, RunFault, RunObserver, fit
from aiether.adaptive import MemorySettings, ProductKeyMemory
from aiether.integrations._memory import Workload, check_memory
from aiether.integrations._setup import check_cuda_graphs

from .test_compile import growth
from .tiny import AtStep, tiny_model, tiny_trainer

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS: dict[str, Any] = {"use_cpu": False, "train_sampling_strategy": "sequential"}


class Losses(RunObserver):
    def __init__(self) -> None:
        self.training: list[float] = []
        self.evaluation: list[float] = []

    def on_log(self, row: dict[str, Any]) -> None:
        self.training += [row["loss"]] if "loss" in row else []

    def on_evaluate(self, row: dict[str, Any]) -> None:
        self.evaluation += [row["eval_loss"]] if "eval_loss" in row else []


def train(path: Path, graphs: bool, *, resume: bool = False, **settings: Any) -> tuple[Losses, Any]:
    losses = Losses()
    trainer = tiny_trainer(path, tiny_model(dropout=0.0), **OPTIONS, **settings)
    result = fit(
        trainer, growth(max_layers=8), observers=[losses], compile=True, cuda_graphs=graphs, resume=resume
    )
    return losses, result


@on_cuda
def test_cuda_graphs_train_as_kernels_launched_one_by_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"per_device_eval_batch_size": 3}  # of 8: batches of two shapes
    plain, without = train(tmp_path / "plain", graphs=False, **settings)
    replayed, with_graphs = train(tmp_path / "graphs", graphs=True, **settings)
    assert with_graphs.depth == without.depth == 8
    assert replayed.training == pytest.approx(plain.training, rel=1e-3)
    assert replayed.evaluation == pytest.approx(plain.evaluation, rel=1e-3)
    ours, theirs = with_graphs.model.state_dict(), without.model.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@on_cuda
def test_cuda_graphs_are_replayed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[torch.cuda.CUDAGraph] = []
    honest = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        honest(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    torch._dynamo.reset()
    trainer = tiny_trainer(tmp_path, tiny_model(dropout=0.0), **OPTIONS, max_steps=12, eval_strategy="no")
    fit(trainer, GrowthConfig(trigger="never"), compile=True, cuda_graphs=True)
    per_step = 2 * 2  # blocks, directions: one graph each
    assert len(set(replays[-per_step:])) == per_step
    assert replays[-per_step:] == replays[-2 * per_step : -per_step], "recorded anew in every step"


@on_cuda
def test_dropout_draws_anew_in_every_replay(tmp_path: Path) -> None:
    losses = Losses()
    trainer = tiny_trainer(
        tmp_path, tiny_model(dropout=0.5), **OPTIONS, learning_rate=0.0, max_steps=12, logging_steps=1
    )
    trainer.train_dataset.tokens[:] = trainer.train_dataset.tokens[0]  # type: ignore[attr-defined]
    fit(trainer, GrowthConfig(trigger="never"), observers=[losses], compile=True, cuda_graphs=True)
    assert len(set(losses.training)) == len(losses.training) == 12


@on_cuda
def test_a_resumed_run_with_cuda_graphs_goes_on_as_the_whole_one(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", graphs=True)
    (tmp_path / "cut").mkdir()
    first = tiny_trainer(tmp_path / "cut", tiny_model(dropout=0.0), **OPTIONS)
    first.add_callback(AtStep(12, lambda model, optimizer: _interrupt()))
    half = fit(first, growth(max_layers=8), compile=True, cuda_graphs=True)
    assert (half.status, half.step) == ("interrupted", 12)
    rest, result = train(tmp_path / "cut", graphs=True, resume=True)
    assert result.status == "finished"
    assert rest.evaluation[-3:] == pytest.approx(whole.evaluation[-3:], rel=1e-3)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@on_cuda
def test_the_trial_on_a_gpu_refuses_what_does_not_fit() -> None:
    model: Any = tiny_model(dropout=0.0)
    model.to("cuda")
    config = GrowthConfig(trigger="fixed", growth_fractions=(0.5,), placement="stack", max_layers=4)
    free = torch.cuda.mem_get_info()[0]
    small = Workload(batch_size=4, context_length=16, accumulation=1, moments_per_weight=2.0, bf16=False)
    check_memory(model, config, small, "cuda")
    windows = free // (16 * 16 * 32)  # the residual stream alone of so many, in a few layers, is the memory
    large = Workload(
        batch_size=windows, context_length=16, accumulation=1, moments_per_weight=2.0, bf16=False
    )
    with pytest.raises(ValueError, match="largest planned depth, 4 layers"):
        check_memory(model, config, large, "cuda")
    assert torch.cuda.mem_get_info()[0] > 0.9 * free, "the trial left memory behind"


@on_cuda
def test_running_out_of_gpu_memory_keeps_what_was_trained(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_model(dropout=0.0), **OPTIONS)
    hog: list[torch.Tensor] = []

    def fill(model: Any, optimizer: Any) -> None:
        hog.append(torch.empty(torch.cuda.mem_get_info()[0] * 2, dtype=torch.uint8, device="cuda"))

    trainer.add_callback(AtStep(7, fill))
    with pytest.raises(RunFault, match="ran out of memory") as fault:
        fit(trainer, GrowthConfig(trigger="never"))
    assert "batch" in str(fault.value)
    again = tiny_trainer(tmp_path, tiny_model(dropout=0.0), **OPTIONS)
    assert fit(again, GrowthConfig(trigger="never"), resume=True).status == "finished"


def test_cuda_graphs_are_refused_where_they_do_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="compile=True and a CUDA device"):
        fit(trainer, GrowthConfig(trigger="never"), compile=True, cuda_graphs=True)
    with pytest.raises(ValueError, match="compile=False"):
        check_cuda_graphs(trainer, compiled=False)


@on_cuda
@pytest.mark.parametrize(
    ("settings", "named"),
    [({"gradient_accumulation_steps": 2}, "accumulat"), ({"gradient_checkpointing": True}, "checkpointing")],
)
def test_cuda_graphs_are_refused_where_they_would_go_wrong(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check_cuda_graphs(tiny_trainer(tmp_path, **OPTIONS, **settings), compiled=True)


@on_cuda
def test_a_compiled_memory_reads_and_learns_what_an_eager_one_does() -> None:
    torch.manual_seed(0)
    memory = ProductKeyMemory(64, MemorySettings(keys=16)).cuda()
    hidden, found = torch.randn(4, 32, 64, device="cuda"), []
    for read in (memory, torch.compile(memory, fullgraph=True)):  # slot by slot; as a product with the table
        memory.zero_grad()
        output = read(hidden)
        output.square().sum().backward()
        grads = [parameter.grad.clone() for parameter in memory.parameters() if parameter.grad is not None]
        found.append([output.detach(), *grads])
    for eager, compiled in zip(*found, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-4)
