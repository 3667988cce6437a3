"""A growth that cannot be is found before the first step, and one that fails loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.families import every_second_layer_a_mixture
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from aiether import fit
from aiether.integrations import _model
from aiether.integrations._checkpoint import CheckpointStore

from .test_described import growth
from .tiny import VOCAB, tiny_model, tiny_trainer


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def scaled_by_index() -> PreTrainedModel:
    model = tiny_model("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    return model


IMPOSSIBLE = [
    pytest.param(
        bert, {"init": "zero"}, r"from 2 to 4 layers \(stack, zero\).*init 'zero'", id="post-norm-zero"
    ),
    pytest.param(scaled_by_index, {"placement": "interleave"}, "scale_attn_by_inverse", id="scaled-by-index"),
    pytest.param(
        every_second_layer_a_mixture,
        {"placement": "front", "grow_by": 1},
        "from 2 to 3 layers",
        id="mixture-front",
    ),
    pytest.param(
        bert, {"lag_candidates": ("stack/copy", "stack/zero")}, r"\(stack, zero\)", id="second-candidate"
    ),
]


@pytest.mark.parametrize(("build", "settings", "says"), IMPOSSIBLE)
def test_a_growth_that_cannot_be_is_refused_before_the_first_step(
    tmp_path: Path, build: Any, settings: dict[str, Any], says: str
) -> None:
    trainer = tiny_trainer(tmp_path, build())
    with pytest.raises(ValueError, match=says):
        fit(trainer, growth(**settings))
    assert trainer.state.global_step == 0
    assert not list(tmp_path.rglob("step-*"))


def test_a_later_growth_that_cannot_be_is_found_too(tmp_path: Path) -> None:
    """A copy of layer 0 is dense: it may stand in the third place, and not in the fourth."""
    trainer = tiny_trainer(tmp_path, every_second_layer_a_mixture())
    with pytest.raises(ValueError, match="from 3 to 4 layers"):
        fit(trainer, growth(grow_by=1, growth_fractions=(0.3, 0.6)))
    assert trainer.state.global_step == 0


def test_what_is_never_reached_is_not_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}
    never = fit(tiny_trainer(tmp_path / "never", bert(), **settings), growth(init="zero", trigger="never"))
    assert (never.step, never.depth) == (4, 2)
    once = fit(tiny_trainer(tmp_path / "once", every_second_layer_a_mixture(), **settings), growth(grow_by=1))
    assert (once.step, once.depth) == (4, 3)


def test_a_growth_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "eval_strategy": "no", "save_strategy": "no"}
    expected = fit(tiny_trainer(tmp_path / "whole", tiny_model(), **settings), growth())
    at_growth: dict[str, torch.Tensor] = {}

    def fail(previous: PreTrainedModel, state: Any) -> PreTrainedModel:
        at_growth.update({name: tensor.clone() for name, tensor in previous.state_dict().items()})
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(_model, "build_model", fail)
        with pytest.raises(RuntimeError, match="no room"):
            fit(tiny_trainer(tmp_path / "cut", tiny_model(), **settings), growth())
    saved = CheckpointStore(tmp_path / "cut" / "run").latest()
    assert saved is not None
    assert (saved.step, saved.stage) == (4, 0)
    kept = load_file(saved.path / "model.safetensors")
    assert all(torch.equal(kept[name], at_growth[name]) for name in kept)

    again = fit(tiny_trainer(tmp_path / "cut", tiny_model(), **settings), growth(), resume=True)
    assert (again.step, again.depth, again.num_growths) == (8, 4, 1), "the growth is made up for"
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
