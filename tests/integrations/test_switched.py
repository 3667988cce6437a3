"""What the user switched on in the model is on in every model of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from aiether import FitResult, GrowthConfig, fit
from aiether.growth import family_of
from aiether.integrations._switched import Switched

from .test_described import growth
from .tiny import AtStep, blocks, tiny_model, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


def run(tmp_path: Path, model: PreTrainedModel, config: GrowthConfig, **settings: Any) -> FitResult:
    resume = settings.pop("resume", False)
    quick: dict[str, Any] = {"max_steps": 8, "save_steps": 3, "eval_strategy": "no"}
    return fit(tiny_trainer(tmp_path, model, **{**quick, **settings}), config, resume=resume)


def crash(model: nn.Module, optimizer: Any) -> None:
    raise RuntimeError("crash")


def checkpointed(model: nn.Module) -> list[bool]:
    return [bool(block.gradient_checkpointing) for block in blocks(model)]


def test_gradient_checkpointing_goes_on_after_a_growth_and_after_a_resume(tmp_path: Path) -> None:
    def switched_on() -> PreTrainedModel:
        model = tiny_model("llama", dropout=0.0)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        return model

    counted: list[int] = []

    def count(model: nn.Module, optimizer: Any) -> None:
        functions: list[Any] = [block._gradient_checkpointing_func for block in blocks(model)]
        counted.append(sum(function.keywords["use_reentrant"] for function in functions))

    result = run(tmp_path / "whole", switched_on(), growth(), callbacks=[AtStep(2, count), AtStep(7, count)])
    assert (checkpointed(result.model), counted) == ([True] * 4, [2, 4])
    assert result.model.get_input_embeddings()._forward_hooks, "inputs no longer require gradients"

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "cut", switched_on(), growth(), callbacks=[AtStep(7, crash)])
    again = run(tmp_path / "cut", switched_on(), growth(), resume=True)
    assert (again.depth, checkpointed(again.model)) == (4, [True] * 4)
    plain = run(tmp_path / "plain", tiny_model("llama", dropout=0.0), growth())
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_every_other_layer_stays_every_other_layer() -> None:
    model, deeper = tiny_model("llama", 4), tiny_model("llama", 6)
    for layer in (0, 2):
        block: Any = blocks(model)[layer]
        block.gradient_checkpointing, block._gradient_checkpointing_func = (
            True,
            checkpoint,
        )
    family = family_of(model)
    Switched.of(model, family).apply(deeper, family)
    assert checkpointed(deeper) == [True, False] * 3


def probabilities(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


def test_dropout_that_was_changed_stays_changed(tmp_path: Path) -> None:
    def changed() -> PreTrainedModel:
        model: Any = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        model.transformer.drop.p = 0.5
        return model

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, changed(), growth(), callbacks=[AtStep(7, crash)])
    result = run(tmp_path, changed(), growth(), resume=True)
    assert result.depth == 4
    assert probabilities(blocks(result.model)) == {0.3}
    assert result.model.transformer.drop.p == 0.5  # type: ignore[union-attr]


def test_dropout_that_is_a_number_of_the_attention_is_carried_too() -> None:
    model, deeper = tiny_model("llama", 2), tiny_model("llama", 3)
    for block in blocks(model):
        block.self_attn.attention_dropout = 0.4  # type: ignore[union-attr]
    family = family_of(model)
    Switched.of(model, family).apply(deeper, family)
    assert [block.self_attn.attention_dropout for block in blocks(deeper)] == [0.4] * 3  # type: ignore[union-attr]


def test_layers_with_different_dropout_are_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    model.transformer.h[1].mlp.dropout.p = 0.4
    trainer = tiny_trainer(tmp_path, model)
    with pytest.raises(ValueError, match=r"different p in 'mlp\.dropout' \(\[0\.1, 0\.4\]\)"):
        fit(trainer, growth())
    assert trainer.state.global_step == 0


def test_a_loss_function_of_the_users_own_is_kept(tmp_path: Path) -> None:
    model, called = tiny_model("llama"), []
    plain = model.loss_function

    def counting(*inputs: Any, **named: Any) -> Any:
        called.append(1)
        return plain(*inputs, **named)

    model.loss_function = counting
    result = run(tmp_path, model, growth())
    assert result.depth == 4
    assert len(called) >= 8, "not every step used it"


def test_a_plain_model_has_nothing_switched_on() -> None:
    model = tiny_model("qwen3")
    assert Switched.of(model, family_of(model)) == Switched({}, {}, False)
