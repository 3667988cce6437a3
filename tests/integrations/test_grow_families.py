"""Growth in place for every family of the table, and for modules that no library knows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.families import FAMILY_NAMES, FAMILY_TABLE, VOCAB, FamilyCase
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import aiether
from aiether import GrowthConfig, GrowthError, GrowthPlan
from aiether.growth import TrainingState, family_of
from aiether.integrations._blocks import block_list
from aiether.integrations._model import build_model

from .test_grow import same

TOKENS = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(3))


PLACEMENTS, INITS = ("stack", "interleave", "top", "front"), ("noise", "zero", "random", "copy", "zero")
FORMS = [(PLACEMENTS[index % 4], INITS[index % 5]) for index in range(20)]
"""Families take them in turn; `migrate` is tested with every placement and initialiser for each."""


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, FORMS[index % len(FORMS)]) for index, case in enumerate(FAMILY_TABLE)],
    ids=FAMILY_NAMES,
)
def test_a_family_grows_in_place_as_it_does_on_paper(case: FamilyCase, form: tuple[Any, Any]) -> None:
    placement, init = form
    model = case.build(3)
    family, plan = family_of(model), getattr(GrowthPlan, placement)(model, 5, init)
    with torch.no_grad():
        logits_before = model.eval()(TOKENS).logits
    state = TrainingState(config=model.config.to_dict(), tensors=dict(model.state_dict()), family=family)
    expected = aiether.migrate(state, plan, growth=GrowthConfig(), final_depth=5, seed=1).state
    reference = build_model(model, expected)
    optimizer = AdamW(model.parameters(), lr=1e-2)

    report = aiether.grow(
        model, plan, optimizer=optimizer, seed=1, batch={"input_ids": TOKENS, "labels": TOKENS}
    )

    assert not report.notes, "the live model was compared with a fresh one"
    assert same(dict(model.state_dict()), dict(reference.state_dict()))
    assert model.config.to_dict() == reference.config.to_dict()
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, reference.eval()(TOKENS).logits)
        if init == "zero":
            torch.testing.assert_close(model(TOKENS).logits, logits_before, rtol=1e-5, atol=1e-6)
        cached, uncached = (model.generate(TOKENS, use_cache=use, **settings) for use in (True, False))  # type: ignore[operator]
    assert torch.equal(cached, uncached)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model.train()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name in report.new_tensors if torch.equal(before[name], model.get_parameter(name))]


class Adapter(nn.Module):
    """A low-rank adapter beside a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


def test_zero_keeps_the_function_of_blocks_that_were_changed_after_a_first_look() -> None:
    model: Any = FAMILY_TABLE[FAMILY_NAMES.index("mistral")].build(2)
    assert "self_attn.o_proj.weight" in dict(family_of(model).identity)
    for block in model.model.layers:
        block.self_attn.o_proj = Adapter(block.self_attn.o_proj)
    report = aiether.grow(
        model, GrowthPlan.stack(model, 4, "zero"), optimizer=None, batch={"input_ids": TOKENS}
    )
    assert report.function is not None
    assert report.function.relative_gap < 1e-10


def test_zero_that_does_not_keep_the_function_is_undone() -> None:
    model: Any = FAMILY_TABLE[FAMILY_NAMES.index("llama")].build(2)
    incomplete = family_of(model, output_projections=("mlp.down_proj",))
    plan, batch = GrowthPlan.stack(model, 4, "zero"), {"input_ids": TOKENS}
    with pytest.raises(GrowthError, match="did not keep the model's function"):
        aiether.grow(model, plan, optimizer=None, batch=batch, family=incomplete)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2


def test_of_an_encoder_and_a_decoder_the_named_one_grows_or_the_reason_is_given() -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "decoder_start_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 2, "decoder_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "forced_eos_token_id": None}
    bart = BartForConditionalGeneration(BartConfig(**sizes, **heads, **widths, **tokens)).eval()
    path = "model.decoder.layers"
    with pytest.raises(GrowthError, match="depth_key="):
        aiether.grow(bart, GrowthPlan.top(2, 3), optimizer=None, family=family_of(bart, blocks=path))
    family = family_of(bart, blocks=path, depth_key="decoder_layers")
    aiether.grow(bart, GrowthPlan.interleave(2, 4, "noise"), optimizer=None, family=family)
    assert (bart.config.encoder_layers, bart.config.decoder_layers) == (2, 4)

    t5 = T5ForConditionalGeneration(T5Config(**sizes, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    family = family_of(t5, blocks="decoder.block", depth_key="num_decoder_layers")
    with pytest.raises(GrowthError, match="still states 2 layers"):  # its configuration is a copy
        aiether.grow(t5, GrowthPlan.top(2, 4), optimizer=None, family=family)
    assert (len(t5.decoder.block), t5.config.num_decoder_layers) == (2, 2)


# -- modules without a library ------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, number: int, settings: SimpleNamespace) -> None:
        super().__init__()
        self.number = number + 1  # counts from one
        self.settings = settings
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(self.norm(hidden))


class Classifier(nn.Module):
    def __init__(self, depth: int, *, tied: bool = False) -> None:
        super().__init__()
        self.settings = SimpleNamespace(eps=1e-5)
        self.trunk = nn.ModuleList([Residual(number, self.settings) for number in range(depth)])
        self.head = nn.Linear(8, 3)
        if tied:
            for block in self.trunk:
                block.norm = self.trunk[0].norm  # one norm for all layers

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.trunk:
            hidden = block(hidden)
        return self.head(hidden)


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, torch.zeros(len(output), dtype=torch.long))


@pytest.mark.parametrize("tied", [False, True])
def test_any_module_with_a_list_of_blocks_grows(tied: bool) -> None:
    torch.manual_seed(0)
    model, hidden = Classifier(3, tied=tied), torch.randn(4, 8)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(hidden), None).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model(hidden)

    report = aiether.grow(
        model,
        GrowthPlan.front(model, 5, "zero"),
        optimizer=optimizer,
        moments="copy",
        batch=hidden,
        loss_fn=cross_entropy,
    )

    torch.testing.assert_close(model(hidden), before)
    assert report.function is not None
    assert report.function.loss_after == pytest.approx(cross_entropy(before, None).item())
    assert [block.number for block in model.trunk] == [1, 2, 3, 4, 5]
    assert all(block.settings is model.settings for block in model.trunk)
    assert any("to compare it with" in note for note in report.notes)
    norms = {id(block.get_parameter("norm.weight")) for block in model.trunk}
    assert len(norms) == (1 if tied else 5)
    assert len(report.new_tensors) == (4 if tied else 8)
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]


def test_the_list_can_be_named_where_there_are_several() -> None:
    model = nn.ModuleDict({"left": Classifier(2), "right": Classifier(2)})
    family = family_of(model, blocks="left.trunk")
    aiether.grow(model, GrowthPlan.top(2, 4), optimizer=SGD(model.parameters(), lr=0.1), family=family)
    assert len(list(block_list(model, family))) == 4  # type: ignore[arg-type]
    assert len(model["right"].trunk) == 2  # type: ignore[arg-type]
    elsewhere = replace(family, blocks="middle")
    with pytest.raises(ValueError, match="no block list 'middle'"):
        aiether.grow(model, GrowthPlan.top(4, 5), optimizer=None, family=elsewhere)
