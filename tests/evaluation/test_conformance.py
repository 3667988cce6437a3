from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.evaluation.broken import VOCAB, Fault, Model
from tests.families import FAMILY_NAMES, FAMILY_TABLE, FamilyCase
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from aiether.evaluation import check_conformance
from aiether.evaluation.conformance import CHECKS, Check, ConformanceReport

LATER = {"later tokens", "shorter input"}
CACHED = {"cache, token by token", "cache, two parts", "cache, left padding"}
PADDED = {"left padding", "cache, left padding"}
CAUGHT: dict[Fault, set[str]] = {
    "none": set(),
    "sees later tokens": {*LATER, *CACHED},
    "top-k over the sequence": {*LATER, *CACHED, "left padding"},
    "cache loses a token": CACHED,
    "cache counts one too many": CACHED - PADDED,
    "padding moves positions": PADDED,
    "padding is seen": PADDED,
    "mean over the batch": {"row in a batch", *PADDED},
    "cache adds something": {"use_cache on and off", *CACHED},
    "parameter without use": {"gradient"},
    "router behind a hard choice": {"gradient"},
    "product with zero": {"gradient"},
    "not a number": set(CHECKS) - {"generate()"},
}


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": VOCAB}
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3, **settings})
    )


@pytest.mark.parametrize("case", FAMILY_TABLE, ids=FAMILY_NAMES)
def test_every_family_conforms_with_its_cache_and_without(case: FamilyCase) -> None:
    report = check_conformance(case.build(), length=16)  # attention windows are of four tokens
    assert [check.passed for check in report.checks] == [True] * len(CHECKS), str(report)


@pytest.mark.parametrize("fault", CAUGHT, ids=str)
def test_each_fault_is_caught_by_the_checks_that_are_about_it_and_by_no_other(fault: Fault) -> None:
    report = check_conformance(Model(fault), vocab_size=VOCAB, length=16)
    assert {check.name for check in report.failed} == CAUGHT[fault], str(report)
    assert report["generate()"].passed is None
    assert report.passed == (fault == "none")
    assert all(check.where for check in report.failed)


def test_a_leak_at_one_position_alone_is_found() -> None:
    class Leaky(Model):
        def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(input_ids, *args, **kwargs)
            if input_ids.shape[1] > 6:
                here = torch.arange(input_ids.shape[1])[:, None] == 5
                output.logits = output.logits + here * self.head(self.embedding(input_ids[:, 6:7]))
            return output

    report = check_conformance(Leaky(), vocab_size=VOCAB, length=16, checks=sorted(LATER))
    assert {check.name for check in report.failed} == LATER


def test_a_parameter_without_gradient_is_named_with_what_is_wrong() -> None:
    named: dict[Fault, str] = {
        "parameter without use": "idle (none)",
        "router behind a hard choice": "router.weight (none), router.bias (none)",
        "product with zero": "idle (zero)",
    }
    for fault, detail in named.items():
        [check] = check_conformance(Model(fault), vocab_size=VOCAB, checks=["gradient"]).checks
        assert check.detail == detail
        assert check.where == f"{check.worst:.0f} of {len(list(Model(fault).parameters()))} tensors"


def test_a_gate_that_starts_at_zero_holds_no_gradient_back() -> None:
    class Gated(Model):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def _route(self, x: Tensor) -> Tensor:
            return x + self.gate * (super()._route(x) - x)

    model = Gated()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    [check] = check_conformance(model, vocab_size=VOCAB, checks=["gradient"]).checks
    assert check.passed
    assert "zero at these weights and not beside them: router.weight, router.bias, mlp" in check.detail
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_parameters_are_told_and_not_asked() -> None:
    model = Model("parameter without use")
    model.idle.requires_grad_(False)
    [check] = check_conformance(model, vocab_size=VOCAB, checks=["gradient"]).checks
    assert check.passed
    assert "frozen and not looked at: 1 of" in check.detail


def test_generate_that_forgets_the_padding_is_caught_by_its_own_check_alone() -> None:
    class Forgetful(GPT2LMHeadModel):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            whole: Any = super()
            inputs = whole.prepare_inputs_for_generation(*args, **kwargs)
            return {key: value for key, value in inputs.items() if key != "attention_mask"}

    report = check_conformance(Forgetful(gpt2().config), length=16)
    assert [check.name for check in report.failed] == ["generate()"], str(report)
    assert "of padding, new token" in report["generate()"].where


def test_what_a_plain_module_does_not_offer_is_said_to_be_not_applicable() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    report = check_conformance(Logits(), vocab_size=VOCAB)
    assert report.passed
    lacking = {check.name: check.detail for check in report.checks if check.passed is None}
    assert set(lacking) == {*CACHED, "left padding", "use_cache on and off", "generate()"}
    assert lacking["left padding"] == "forward takes no attention_mask"
    assert lacking["cache, two parts"] == "forward takes no past_key_values"
    assert "cache, two parts       not applicable\n" in str(report)
    assert str(report).endswith("4 passed, 6 not applicable")
    assert not check_conformance(Logits(), vocab_size=VOCAB, checks=["left padding"]).passed


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    class Counting(Model):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.drop = nn.Dropout(0.5)

        def _route(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.drop(super()._route(x))

    model = Counting()
    model.train()
    model.mlp.eval()
    model.head.weight.grad = kept = torch.ones_like(model.head.weight)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert check_conformance(model, vocab_size=VOCAB, length=16).passed
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.head.weight.grad is kept
    assert kept.eq(1).all()
    assert model.mlp.weight.grad is None
    assert model.training
    assert not model.mlp.training
    assert model.seen == 0


def test_a_bfloat16_model_is_checked_as_a_copy_in_float32() -> None:
    model: Any = gpt2()
    model = model.to(torch.bfloat16)
    report = check_conformance(model, checks=["cache, token by token"])
    assert report.passed
    assert report.note == "checked as a copy in float32"
    assert model.dtype == torch.bfloat16
    assert "float32" in str(report)


def test_large_logits_are_held_to_their_own_size_and_small_leaks_are_seen() -> None:
    loud = gpt2()
    with torch.no_grad():
        loud.transformer.ln_f.weight.mul_(1e4)
    report = check_conformance(loud)
    assert report.passed, str(report)
    assert report["cache, two parts"].bound > 1e-2

    class Leaking(Model):
        def _route(self, x: Tensor) -> Tensor:
            return super()._route(x) + 1e-4 * x.mean(1, keepdim=True)

    assert not check_conformance(Leaking(), vocab_size=VOCAB, checks=["later tokens"]).passed


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names 'speed'; choose among 'later tokens'"):
        check_conformance(gpt2(), checks=["speed"])
    with pytest.raises(ValueError, match="length is 33; allowed is 8 to 32"):
        check_conformance(gpt2(), length=33)
    with pytest.raises(ValueError, match="give vocab_size"):
        check_conformance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_conformance(T5ForConditionalGeneration(T5Config(d_model=8, num_layers=1, d_ff=8, vocab_size=9)))
    with pytest.raises(ValueError, match=r"needed are logits \(batch, length, vocabulary\)"):
        check_conformance(nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), vocab_size=9)


def test_a_report_is_a_table_and_a_dict() -> None:
    checks = (Check("a", True, 1e-7, 1e-4), Check("b", False, math.nan, 1e-4, "row 1, position 2"))
    report = ConformanceReport("Model", 1234, 32, 0, checks)
    assert not report.passed
    assert "b      failed  nan    0.0001  row 1, position 2" in str(report)
    assert str(report).endswith("1 passed, 1 failed")
    stored = report.to_dict()
    assert [each["worst"] for each in stored["checks"]] == [1e-7, None]
    assert [each["status"] for each in stored["checks"]] == ["passed", "failed"]
