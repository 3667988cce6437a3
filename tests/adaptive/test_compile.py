from __future__ import annotations

import copy
from typing import Any

import torch
from tests.adaptive.models import gradients, lahr, tokens
from tests.families import FAMILY_TABLE
from torch import nn

from aiether.adaptive import add_mixture_of_depths

LLAMA = next(case for case in FAMILY_TABLE if case.name == "llama")


def _trained_alike(eager: nn.Module, compiled: nn.Module, vocabulary: int, rows: int = 2) -> None:
    """Three steps of SGD with both: equal gradients, one graph each, none of it compiled anew."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, compiled)]
    for step in range(3):
        input_ids = tokens(rows, 16, seed=step) % vocabulary
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for model, optimizer in zip((eager, compiled), optimizers, strict=True):
                optimizer.zero_grad()
                model(input_ids=input_ids, labels=input_ids).loss.backward()
                optimizer.step()
        for name, gradient in gradients(eager).items():
            assert torch.allclose(gradients(compiled)[name], gradient, atol=1e-5), (step, name)


def test_a_routed_layer_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    eager = lahr("mod_only", router="threshold").train()
    compiled = copy.deepcopy(eager)
    compiled.model.layers[1].compile(fullgraph=True, backend="aot_eager")
    _trained_alike(eager, compiled, 37)


def test_the_latent_block_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    eager = lahr("latent_only", iterations=3).train()
    compiled = copy.deepcopy(eager)
    compiled.model.latent.block.compile(fullgraph=True, backend="aot_eager")
    _trained_alike(eager, compiled, 37)


def test_a_routed_layer_of_a_decoder_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    eager: Any = add_mixture_of_depths(LLAMA.build(depth=2), capacity=0.25).train()
    compiled = copy.deepcopy(eager)
    compiled.model.layers[1].compile(fullgraph=True, backend="aot_eager")
    _trained_alike(eager, compiled, 32)


def test_iterations_with_rows_that_end_compile_to_one_graph() -> None:
    torch._dynamo.reset()
    eager = lahr("latent_only", iterations=4).train()
    compiled = copy.deepcopy(eager)
    compiled.model.latent.compile(fullgraph=True, backend="aot_eager")
    assert eager.model.latent.settings.training_rows(4) == [4, 4, 3, 3]
    _trained_alike(eager, compiled, 37, rows=4)
