from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import FAMILY_NAMES, FAMILY_TABLE, VOCAB, FamilyCase
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import aiether
from aiether.adaptive import add_mixture_of_depths, load_mixture_of_depths
from aiether.adaptive.routed_layer import RoutedLayer
from aiether.adaptive.routing import Routing, RoutingSettings
from aiether.adaptive.trace import trace_tokens
from aiether.growth import GrowthPlan, family_of

CASES = {case.name: case for case in FAMILY_TABLE}
PLAIN = [name for name in FAMILY_NAMES if name != "lahr"]
FAMILIES = pytest.mark.parametrize("case", [CASES[name] for name in PLAIN], ids=PLAIN)


def _tokens(rows: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _routed(case: FamilyCase, **settings: Any) -> Any:
    """Four layers, two of them routed; some windows reach less far than the text."""
    model = add_mixture_of_depths(case.build(depth=4), **{"capacity": 0.25, "burst": 3, **settings})
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, Routing):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
    return model


def _logits(model: PreTrainedModel, input_ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **{"use_cache": False, **given}).logits


def _in_pieces(model: PreTrainedModel, input_ids: Tensor, **given: Any) -> Tensor:
    """Logits by a cached pass over a prompt, a part, and single tokens."""
    pieces, cache = [], None
    with torch.no_grad():
        for begin, end in ((0, 9), (9, 13), *((t, t + 1) for t in range(13, input_ids.shape[1]))):
            part = {name: value[:, :end] for name, value in given.items()}
            if "position_ids" in part:
                part["position_ids"] = part["position_ids"][:, begin:]
            output = model(input_ids=input_ids[:, begin:end], past_key_values=cache, use_cache=True, **part)
            cache = output.past_key_values
            pieces.append(output.logits)
    return torch.cat(pieces, 1)


@FAMILIES
def test_routed_decoders_are_causal_and_a_cache_and_padding_change_nothing(case: FamilyCase) -> None:
    model, input_ids = _routed(case), _tokens()
    full = _logits(model, input_ids)
    changed = torch.cat([input_ids[:, :11], _tokens(seed=2)[:, 11:]], -1)
    assert torch.equal(_logits(model, changed)[:, :11], full[:, :11])
    assert torch.allclose(_logits(model, input_ids[:, :11]), full[:, :11], atol=1e-5)
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.long), input_ids], -1)
    mask = (torch.arange(26) >= torch.tensor([[6], [10]])).long()
    padded = padded * mask
    given = {"attention_mask": mask}
    if case.name != "opt":  # which makes its own
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    found = _logits(model, padded, **given)
    assert torch.allclose(found[0, 6:], full[0], atol=1e-5)
    assert torch.allclose(found[1, 10:], _logits(model, padded[1:, 10:])[0], atol=1e-5)
    assert torch.allclose(_in_pieces(model, padded, **given)[mask.bool()], found[mask.bool()], atol=1e-5)


@FAMILIES
def test_all_tokens_through_open_gates_are_the_model_as_it_was(case: FamilyCase) -> None:
    plain, input_ids = case.build(depth=4), _tokens()
    model = add_mixture_of_depths(case.build(depth=4), capacity=1.0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Routing):
                module.scores = lambda hidden: hidden.new_full(hidden.shape[:2], 99.0)  # type: ignore[method-assign]
    assert torch.allclose(_logits(model, input_ids), _logits(plain, input_ids), atol=1e-5)
    assert torch.allclose(_in_pieces(model, input_ids), _logits(plain, input_ids), atol=1e-5)
    model.train()
    assert torch.allclose(_logits(model, input_ids), _logits(plain, input_ids), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3", "mixtral"])
def test_a_routed_decoder_learns_is_saved_and_comes_back(name: str, tmp_path: Path) -> None:
    model, input_ids = _routed(CASES[name], router="threshold").train(), _tokens()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    for each in (model, other):
        for _ in range(2):
            each.zero_grad()
            each(input_ids=input_ids, labels=input_ids).loss.backward()
    for (tensor, parameter), again in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None, tensor
        assert parameter.grad.abs().sum() > 0, tensor
        assert torch.allclose(parameter.grad, again.grad, atol=1e-6), tensor  # type: ignore[arg-type]
    routing = next(module for module in model.modules() if isinstance(module, Routing))
    assert routing.threshold != 0
    model.eval().save_pretrained(tmp_path)
    loaded, auto = load_mixture_of_depths(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(auto) is type(loaded) is type(model)
    for each in (loaded, auto):
        assert all(torch.equal(tensor, each.state_dict()[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(_logits(each, input_ids), _logits(model, input_ids))
    half = load_mixture_of_depths(tmp_path, dtype=torch.bfloat16)
    kinds = {"routing" in key: parameter.dtype for key, parameter in half.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    half.save_pretrained(tmp_path / "again")
    again = load_mixture_of_depths(tmp_path / "again")
    assert torch.equal(_logits(again, input_ids), _logits(half, input_ids))
    writer: Any = loaded
    written = writer.generate(input_ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    slowly = writer.generate(
        input_ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert torch.equal(written, slowly)


def test_nothing_loads_a_routed_model_without_its_routers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _routed(CASES["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama_mixture_of_depths"
    assert config["routed_layers"] == [False, True, False, True]
    # Another process has not seen this kind of model.
    for known in ("CONFIG_MAPPING",):
        mapping = getattr(__import__("transformers").models.auto.configuration_auto, known)
        monkeypatch.setattr(mapping, "_extra_content", {})
    with pytest.raises(ValueError, match="llama_mixture_of_depths"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama_mixture_of_depths"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "llama_mixture_of_depths" in caplog.text, "transformers warns of the other kind"
    CASES["llama"].build().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="without Mixture-of-Depths"):
        load_mixture_of_depths(tmp_path / "plain")


def test_a_window_is_kept_where_few_tokens_are_processed() -> None:
    model, input_ids = _routed(CASES["mistral"], capacity=0.5, layers=(0, 1, 2, 3)), _tokens(1, 40)
    changed = input_ids.clone()
    changed[:, :20] = _tokens(1, 20, seed=5)
    reach = 4 * (model.config.sliding_window - 1)  # four layers, whatever they skip
    budget = [module for module in model.modules() if isinstance(module, Routing)]
    for routing in budget:  # what is processed must not follow from what was before
        routing.wanted = lambda _, __, places: places % 2 == 1  # type: ignore[method-assign]
    one, other = _logits(model, input_ids), _logits(model, changed)
    assert not torch.allclose(one[:, 21], other[:, 21], atol=1e-4)
    assert torch.allclose(one[:, 20 + reach :], other[:, 20 + reach :], atol=1e-6)


def test_hidden_states_and_figures_of_a_routed_decoder() -> None:
    model = _routed(CASES["llama"])
    assert len(model(input_ids=_tokens(), output_hidden_states=True).hidden_states) == 5
    model.reset_compute_figures()
    _logits(model, _tokens(2, 40))
    assert 0 < model.compute_figures()["capacity"] <= 0.25 * 1.5 + 4 / 40


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        ("bloom", {"hidden_size": 16, "n_head": 2, "n_layer": 2}, "attention interface"),
        (
            "gpt_neo",
            {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "attention_types": [[["local"], 2]]},
            "att",
        ),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "add_cross_attention": True}, "encoder"),
        ("lahr", CASES["lahr"].settings | {"num_hidden_layers": 2}, "its own configuration"),
    ],
)
def test_what_cannot_be_routed_is_refused(model_type: str, settings: dict[str, Any], why: str) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **settings)
    model = AutoModelForCausalLM.from_config(config)
    kind = type(model)
    with pytest.raises(ValueError, match=why):
        add_mixture_of_depths(model)
    assert type(model) is kind
    assert not any(isinstance(module, RoutedLayer) for module in model.modules())


def test_wrong_layers_are_refused_and_a_second_routing_too() -> None:
    model = CASES["llama"].build(depth=2)
    wrongs: list[dict[str, Any]] = [{"every": 0}, {"every": 3}, {"layers": (2,)}, {"layers": ()}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="of 2 layers"):
            add_mixture_of_depths(model, **wrong)
    add_mixture_of_depths(model, layers=(0,))
    with pytest.raises(ValueError, match="already"):
        add_mixture_of_depths(model, layers=(1,))
    chunked = CASES["qwen3"].build(depth=2)
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        add_mixture_of_depths(chunked)
    assert not any(isinstance(module, Routing) for module in chunked.modules())


def test_a_routed_decoder_is_not_grown_and_a_grown_one_is_routed() -> None:
    model = _routed(CASES["llama"])
    names = [*model.state_dict()]
    refused = [
        lambda: family_of(model, blocks="model.layers"),
        lambda: family_of(model.config.to_dict(), names=names),
        lambda: aiether.grow(
            model, GrowthPlan.stack(model, 8, "copy"), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        ),
    ]
    for attempt in refused:
        with pytest.raises(ValueError, match=r"llama_mixture_of_depths does not grow.*as it was before"):
            attempt()
    assert [*model.state_dict()] == names
    plain, input_ids = CASES["llama"].build(depth=4), _tokens()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    aiether.grow(plain, GrowthPlan.stack(plain, 8, "copy"), optimizer=optimizer)
    routed = add_mixture_of_depths(plain, every=2, capacity=0.25)
    assert routed.config.routed_layers == [False, True] * 4
    assert _logits(routed, input_ids).isfinite().all()


def test_pickled_and_copied_a_routed_decoder_is_the_same_model() -> None:
    model, ids = _routed(CASES["llama"]).eval(), _tokens()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301 - our own
        assert type(other) is type(model)
        assert type(other.config) is type(model.config)
        assert torch.equal(_logits(other, ids), _logits(model, ids))


def test_settings_are_given_whole_or_one_by_one() -> None:
    model, settings = CASES["llama"].build(depth=4), RoutingSettings(router="threshold")
    given: dict[str, Any]
    for given in ({"capacity": 0.5}, {"burst": 3}):
        with pytest.raises(ValueError, match="give one of the two"):
            add_mixture_of_depths(model, settings=settings, **given)


def test_a_routed_decoder_is_traced_too() -> None:
    found = trace_tokens(_routed(CASES["llama"]), _tokens(1)[0])
    assert found.layers == (1, 3)
    assert [len(row) for row in found.processed] == [20, 20]
    assert found.iterations == ()
