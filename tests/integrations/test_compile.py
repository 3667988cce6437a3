"""Depth growth under per-block compile: no new graph, and a known number where layers are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from aiether import GrowthConfig, RunObserver, fit
from aiether.integrations import _model
from aiether.integrations._model import compile_blocks

from .tiny import tiny_model, tiny_trainer

GRAPHS_WITH_FREEZING = 3
"""`requires_grad` of weights and input is part of a graph's guards, so the report's protocol adds three: a
new layer on frozen embeddings, a frozen layer that passes a gradient on, a frozen layer in evaluation."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Counts graphs through every `block.compile()` of the run."""
    torch._dynamo.reset()
    counter = CompileCounter()
    honest = torch.nn.Module.compile

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        honest(module, *args, backend=counter, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    yield lambda: counter.frame_count
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = False


class GraphsPerStage(RunObserver):
    def __init__(self, graphs: Callable[[], int]) -> None:
        self.graphs = graphs
        self.at_stage: list[int] = []
        self.last = 0

    def on_stage(self, **stage: Any) -> None:
        self.at_stage.append(self.graphs())


def growth(**settings: Any) -> GrowthConfig:
    plain: dict[str, Any] = {
        "trigger": "fixed",
        "growth_fractions": (0.2, 0.4, 0.6),
        "placement": "stack",
        "grow_by": "double",
        "max_layers": 16,
        "warmup_steps": 0,
        "collect_interval_steps": 1,
        "protocol": "none",
    }
    return GrowthConfig(**{**plain, **settings})


def grow_thrice(folder: Path, graphs: Callable[[], int], arch: str, placement: str) -> None:
    """All graphs are those of the first stage."""
    watch = GraphsPerStage(graphs)
    result = fit(
        tiny_trainer(folder, tiny_model(arch)), growth(placement=placement), observers=[watch], compile=True
    )
    assert (result.depth, result.num_growths) == (16, 3)
    assert graphs() > 0, "nothing was compiled"
    assert watch.at_stage[0] == 0
    assert set(watch.at_stage[1:]) == {graphs()}, "a growth compiled again"


def test_growth_makes_no_new_graph_in_training_or_evaluation(
    tmp_path: Path, graphs: Callable[[], int]
) -> None:
    grow_thrice(tmp_path, graphs, "llama", "front")


def test_nor_does_it_for_gpt2_and_freezing_adds_a_known_number_once(
    tmp_path: Path, graphs: Callable[[], int]
) -> None:
    grow_thrice(tmp_path / "plain", graphs, "gpt2", "stack")
    without = graphs()
    frozen = growth(
        protocol="report", isolated_warmup_steps=1, placement="front", growth_fractions=(0.2, 0.6)
    )
    result = fit(tiny_trainer(tmp_path / "frozen"), frozen, compile=True)
    assert result.num_growths == 2
    assert graphs() - without == GRAPHS_WITH_FREEZING


def test_the_generation_cache_is_refused_under_compile() -> None:
    model = tiny_model()
    model.config.use_cache = True
    family = _model.Family(model_type="gpt2", blocks="transformer.h", output_projections=())
    with pytest.raises(ValueError, match="use_cache=False"):
        compile_blocks(model, family)


def test_forks_make_no_new_graph(tmp_path: Path, graphs: Callable[[], int]) -> None:
    """A graph for each fork would soon hit the limit at which compilation gives up."""
    watch = GraphsPerStage(graphs)
    config = growth(trigger="lag", dry_run=True, lag_interval=1, lag_steps=1, init="copy", latest_growth=0.8)
    trainer = tiny_trainer(tmp_path, tiny_model(depth=1), max_steps=10)
    fit(trainer, config, observers=[watch], compile=True)
    assert watch.at_stage[0] == 0
    assert len(watch.at_stage) == 4, "a stage after each of three probes"
    assert set(watch.at_stage[1:]) == {graphs()}, "a fork compiled again"
