"""transformers' hooks that collect hidden states, attentions and router logits, after a growth in place.

The library registers them once, at the first forward pass that asks for such outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import aiether
from aiether import GrowthPlan

from .test_grow import batch
from .test_grow_faults import Fault
from .tiny import CONTEXT, VOCAB, blocks, tiny_model

CAPTURED: dict[str, dict[str, Any]] = {
    "gpt2": {"output_hidden_states": True, "output_attentions": True},
    "llama": {"output_hidden_states": True, "output_attentions": True},
    "mixtral": {"output_hidden_states": True, "output_router_logits": True},
}


def model_of(arch: str) -> PreTrainedModel:
    if arch != "mixtral":
        model = tiny_model(arch, dropout=0.0)
        model.set_attn_implementation("eager")  # the only one that gives attentions
        return model
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        num_local_experts=4,
        use_cache=False,
        output_router_logits=True,
    )
    return MixtralForCausalLM(config)


def captured(model: PreTrainedModel, asked: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return dict(model.eval()(**batch(), **asked))


@pytest.mark.parametrize("init", ["noise", "zero"])
@pytest.mark.parametrize("arch", sorted(CAPTURED))
def test_outputs_of_new_layers_are_collected_as_in_a_reloaded_model(
    arch: str, init: Any, tmp_path: Path
) -> None:
    model, asked = model_of(arch), CAPTURED[arch]
    captured(model, asked)
    for depth in (3, 5):  # a new block may be the next one's source
        report = aiether.grow(model, GrowthPlan.interleave(model, depth, init), optimizer=None)
        assert not any("hooks" in note for note in report.notes)
    model.save_pretrained(tmp_path)
    attention: Any = {"attn_implementation": "eager"} if arch != "mixtral" else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **attention)

    ours, theirs = captured(model, asked), captured(loaded, asked)

    assert len(ours["hidden_states"]) == 6
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
    assert ("aux_loss" in ours) == (arch == "mixtral")


def test_hooks_of_the_user_stay_as_they_are_beside_the_librarys() -> None:
    model, asked = model_of("llama"), CAPTURED["llama"]
    seen: list[int] = []
    blocks(model)[1].register_forward_hook(lambda *_: seen.append(1))
    captured(model, asked)
    blocks(model)[1].register_forward_hook(lambda *_: seen.append(2), always_call=True)
    hooks = [list(module._forward_hooks.items()) for module in model.modules()]
    sources = list(model.modules())

    report = aiether.grow(model, GrowthPlan.top(model, 3), optimizer=None)

    assert any(note.startswith("2 hooks") for note in report.notes)
    assert [list(module._forward_hooks.items()) for module in sources] == hooks
    seen.clear()
    assert len(captured(model, asked)["hidden_states"]) == 4
    assert seen == [1, 2]


def test_a_growth_that_fails_leaves_the_librarys_hooks_as_they_were() -> None:
    model, asked = model_of("llama"), CAPTURED["llama"]
    blocks(model)[1].compile(backend="eager")
    before = captured(model, asked)

    def fail(block: Any) -> None:
        raise Fault

    with pytest.raises(Fault):
        aiether.grow(model, GrowthPlan.top(model, 4), optimizer=None, compile_block=fail)

    after = captured(model, asked)
    assert [len(after[name]) for name in ("hidden_states", "attentions")] == [3, 2]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
