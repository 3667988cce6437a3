"""Trained decoders with toroidal layers: every family of the table."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE, FamilyCase
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, StaticCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaForSequenceClassification

import aiether
from aiether.evaluation import check_conformance
from aiether.evaluation.conformance import CHECKS
from aiether.toroidal import (
    ToroidalAttention,
    ToroidalSettings,
    restore,
    set_backend,
    set_progress,
    torus_terms,
)
from aiether.toroidal.attention import choose_backend
from aiether.toroidal.rotary import turn_by_place

REFUSED = {"gemma2": "attention interface|scores are capped", "lahr": "no single attention module"}
CONVERTED = [case for case in FAMILY_TABLE if case.name not in REFUSED]
LLAMA = next(case for case in FAMILY_TABLE if case.name == "llama")


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def converted(case: FamilyCase = LLAMA, progress: float = 1.0, depth: int = 2, **options: Any) -> Any:
    chosen = {"platters": 2, "period": 16, "lambda_distance": 4.0, **options}
    model = aiether.retrofit(case.build(depth=depth), layers=range(depth), **chosen)
    set_progress(model, progress)
    return model


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.name)
def test_a_converted_model_is_the_one_that_it_was(case: FamilyCase) -> None:
    model = case.build(depth=2)
    with torch.no_grad():
        before = model(tokens()).logits
        for platters in (1, 2, 4, 8):
            if (getattr(model.config, "head_dim", None) or 8) % platters:
                continue
            toroidal: Any = aiether.retrofit(
                copy.deepcopy(model), layers=[0, 1], platters=platters, period=16
            )
            assert torch.equal(toroidal(tokens()).logits, before)
            set_progress(toroidal, 1e-7)  # the toroidal path, next to its beginning
            assert torch.allclose(toroidal(tokens()).logits, before, atol=1e-5)
            set_progress(toroidal, 1.0)
            assert (toroidal(tokens()).logits - before).abs().max() > 1e-3, "and it moves"


def test_a_model_that_has_not_moved_yet_conforms() -> None:
    report = check_conformance(converted(progress=0.0), length=16)
    assert [check.passed for check in report.checks] == [True] * len(CHECKS), str(report)
    assert "take no part yet" in str(report)


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.name)
def test_a_converted_family_conforms(case: FamilyCase) -> None:
    report = check_conformance(converted(case), length=16)
    assert [check.passed for check in report.checks] == [True] * len(CHECKS), str(report)


@pytest.mark.parametrize("options", [{"distance": "triangle"}, {"window": 5}, {"fusion_mode": "attention"}])
def test_other_forms_conform(options: dict[str, Any]) -> None:
    checks = ("later tokens", "cache, left padding", "gradient")
    report = check_conformance(converted(**options), length=16, checks=checks)
    assert [check.passed for check in report.checks] == [True] * len(checks), str(report)


@pytest.mark.parametrize("whole", [False, True])
def test_a_name_on_the_hub_is_loaded_as_its_folder_is(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, cache = LLAMA.build(depth=2), tmp_path / "cached"
    base.save_pretrained(tmp_path / "base")
    model: Any = aiether.retrofit(base, layers=[0], platters=2, period=16)
    set_progress(model, 1.0)
    model.save_pretrained(
        tmp_path / "all", whole=whole, **({} if whole else {"base": str(tmp_path / "base")})
    )
    (tmp_path / "all" / "other.safetensors").write_bytes(b"of something else")
    asked: list[dict[str, Any]] = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        if name == "me/missing":
            raise OSError("\nno such repository\nand more")
        asked.append(options)
        cache.mkdir(exist_ok=True)
        for file in (tmp_path / ("base" if name == "me/plain" else "all")).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found: Any = aiether.load("me/torus", revision="v1", local_files_only=True)
    assert torch.equal(found.eval()(tokens()).logits, model.eval()(tokens()).logits)
    assert asked == [{"revision": "v1", "local_files_only": True}] * 2
    assert not (cache / "other.safetensors").exists()
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match="without toroidal layers"):
        aiether.load("me/plain")
    assert not list(cache.glob("*.safetensors")), "weights are fetched of a torus alone"
    with pytest.raises(ValueError, match=r"'me/missing' is not a folder.*\(no such repository\): check"):
        aiether.load("me/missing")
    for local in (tmp_path / "nothing", "./nothing", "../nothing"):
        with pytest.raises(ValueError, match="holds no model"):
            aiether.load(local)


def test_a_window_of_the_mask_itself_has_no_sinks_that_move_along() -> None:
    model = converted(sinks=2, period=50)
    ids, order = tokens(1, 20), torch.arange(20)
    steps = order[:, None] - order
    window = (steps >= 0) & (steps < 6)
    with torch.no_grad():
        found = model(ids, attention_mask=window[None, None], use_cache=False).logits
        model.config.toroidal["sinks"] = 0
        for terms in torus_terms(model):
            terms.settings = replace(terms.settings, sinks=0)
        none = model(ids, attention_mask=window[None, None], use_cache=False).logits
    far = slice(13, None)  # two layers see ten tokens back, past the row's own sinks
    assert torch.allclose(found[:, far], none[:, far], atol=1e-5)
    assert not torch.allclose(found[:, 2:7], none[:, 2:7], atol=1e-5), "the row's own are there"


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"platters": 1, "distance": "triangle"}])
def test_documents_packed_into_a_row_are_what_they_are_alone(options: dict[str, Any]) -> None:
    model = converted(sinks=2, **options)
    documents = [tokens(1, length, seed=length) for length in (13, 9, 14)]
    places = torch.cat([torch.arange(each.shape[1]) for each in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, 1), position_ids=places, use_cache=False).logits
        alone = torch.cat([model(each, use_cache=False).logits for each in documents], 1)
    assert torch.allclose(packed, alone, atol=1e-5), (packed - alone).abs().amax(-1)


def test_beams_and_sampling_work_with_padding() -> None:
    model = converted()
    ids = tokens(2, 8)
    ids[1, :3] = 0
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for asked in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(0)
        both = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **asked)
        torch.manual_seed(0)
        without_cache = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, use_cache=False, **asked
        )
        assert torch.equal(both, without_cache)


def test_a_static_cache_decodes_the_same() -> None:
    model, ids = converted(), tokens(2, 8)
    kinds = [{}, {"cache_implementation": "static"}]
    found = [
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **kind) for kind in kinds
    ]
    assert torch.equal(*found)


def sharp(**options: Any) -> Any:
    """With scores that tell tokens apart, which a small model's do not before training."""
    model = converted(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_a_static_cache_is_filled_as_no_cache_would_see_it(name: str, chunk: int) -> None:
    case = next(case for case in FAMILY_TABLE if case.name == name)
    model, ids = sharp(case=case), tokens(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=24)
        found = [
            model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunk, dim=1)
        ]
        changed = ids.clone()
        changed[:, -1] = (ids[:, -1] + 1) % 32
        cache = StaticCache(config=model.config, max_cache_len=24)
        before = model(changed, past_key_values=cache, use_cache=True).logits[:, :-1]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(before, expected[:, :-1], atol=2e-4, rtol=1e-4)


def test_gradient_checkpointing_computes_the_same_gradients() -> None:
    model = converted().train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][name], grad, atol=1e-6) for name, grad in found[0].items())


def test_only_the_named_layers_change() -> None:
    model = aiether.retrofit(LLAMA.build(depth=3), layers=[1], platters=2)
    assert [name for name, _ in model.named_modules() if name.endswith("torus")] == [
        "model.layers.1.self_attn.torus"
    ]
    assert len(list(torus_terms(model))) == 1


@pytest.mark.parametrize(
    ("layers", "options", "named"),
    [
        ([2], {}, "from 0 to 1"),
        ([], {}, "several whole numbers"),
        ("01", {}, "several whole numbers"),
        ([0.0], {}, "several whole numbers"),
        ([True], {}, "several whole numbers"),
        (None, {}, "several whole numbers"),
        ([0], {"settings": {"platters": 2}}, "ToroidalSettings are meant"),
        ([0, 0], {}, "once"),
        ([0], {"platters": 3}, "does not divide"),
        ([0], {"fusion_mode": "sum"}, "low_rank, attention, mean"),
        ([0], {"lamda": 1.0}, "lamda is no setting"),
        ([0], {"settings": ToroidalSettings(), "platters": 4}, "give one of the two"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    layers: Any, options: dict[str, Any], named: str
) -> None:
    model = LLAMA.build(depth=2)
    kind, held = type(model), set(model.state_dict())
    with pytest.raises(ValueError, match=named):
        aiether.retrofit(model, layers=layers, **options)
    assert type(model) is kind
    assert set(model.state_dict()) == held
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_are_refused(name: str) -> None:
    case = next(case for case in FAMILY_TABLE if case.name == name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        aiether.retrofit(case.build(depth=2), layers=[0])


def test_a_conversion_can_be_undone() -> None:
    plain = LLAMA.build(depth=2)
    model = restore(converted())
    assert type(model) is type(plain)
    assert model.config.to_dict() == {**plain.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_undone_it_attends_by_what_it_had(implementation: str) -> None:
    model = LLAMA.build(depth=2)
    model.set_attn_implementation(implementation)
    restore(aiether.retrofit(model, layers=[0]))
    assert model.config._attn_implementation == model.model.config._attn_implementation == implementation


def test_copied_and_pickled_it_is_the_same_model() -> None:
    model = converted(progress=0.5)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert type(again) is type(model)
        assert type(again.config) is type(model.config)
        assert again.config.toroidal == model.config.toroidal
        with torch.no_grad():
            assert torch.equal(again(tokens()).logits, model(tokens()).logits)
            set_progress(again, 1.0)
            assert not torch.equal(again(tokens()).logits, model(tokens()).logits), "a model of its own"
        assert type(restore(again)) is type(LLAMA.build(depth=1))


class Careful(LlamaForCausalLM):
    """A family that keeps a part of itself in single precision."""

    _keep_in_fp32_modules_strict = ["norm"]  # noqa: RUF012 - as transformers declares it


def test_what_a_family_keeps_in_single_precision_stays_so(tmp_path: Path) -> None:
    shape: Any = LLAMA.build(depth=2).config
    model: Any = aiether.retrofit(Careful(shape), layers=[0])
    model.save_pretrained(tmp_path, whole=True)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    single = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert single == {name for name in half.state_dict() if "norm" in name or "torus." in name} - {
        "model.layers.0.self_attn.torus.progress"
    }
    assert Careful._keep_in_fp32_modules_strict == ["norm"]


def test_other_classes_of_a_family_do_not_hide_its_decoder(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    shape: Any = LLAMA.build(depth=2).config
    aiether.retrofit(LlamaForSequenceClassification(LlamaConfig(**shape.to_dict())), layers=[0])
    assert torch.equal(aiether.load(tmp_path).eval()(tokens()).logits, converted()(tokens()).logits)


def test_progress_and_a_second_conversion_are_checked() -> None:
    model = converted()
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        set_progress(model, 1.5)
    with pytest.raises(ValueError, match="progress is None"):
        set_progress(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already"):
        aiether.retrofit(model, layers=[0])
    with pytest.raises(ValueError, match="no toroidal layer"):
        set_progress(LLAMA.build(depth=1), 1.0)


def test_kernels_are_chosen_afterwards_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def choose(settings: ToroidalSettings, *given: Any) -> str:
        taken.append(choose_backend(settings, *given))
        return taken[-1]

    monkeypatch.setattr("aiether.toroidal.attention.choose_backend", choose)
    model = converted(platters=2)
    module = ToroidalAttention(32, 4, platters=2, period=16)
    hidden, ids = torch.randn(1, 9, 32), torch.arange(1, 10)[None]
    found = []
    with torch.no_grad():
        for backend in ("flash", "eager"):
            set_backend(model, backend)
            set_backend(module, backend)
            found.append((model(ids).logits, module(hidden)))
            assert set(taken) == {backend}
            taken.clear()
    for flash, eager in zip(*found, strict=True):
        assert torch.allclose(flash, eager, atol=1e-5)
    model.save_pretrained(tmp_path, whole=True)
    assert {terms.settings.backend for terms in torus_terms(aiether.load(tmp_path))} == {"auto"}
    with pytest.raises(ValueError, match="'metal': choose one of"):
        set_backend(model, "metal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no toroidal layer"):
        set_backend(torch.nn.Linear(2, 2), "eager")
    assert model.config.toroidal["backend"] == "eager"


def test_other_kernels_leave_each_layer_its_sinks() -> None:
    mistral = next(case for case in FAMILY_TABLE if case.name == "mistral")
    model = converted(mistral)
    assert {terms.settings.sinks for terms in torus_terms(model)} == {0}
    set_backend(model, "eager")
    assert {(t.settings.sinks, t.settings.backend) for t in torus_terms(model)} == {(0, "eager")}
    with torch.no_grad():
        assert torch.allclose(model(tokens()).logits, converted(mistral)(tokens()).logits, atol=1e-5)


def test_padding_on_the_left_leaves_gradients_finite() -> None:
    model = converted().train()
    mask = torch.ones_like(tokens())
    mask[0, :5] = 0
    model(tokens(), attention_mask=mask, labels=tokens().masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["phi", "llama", "gpt2"])
def test_autocast_takes_the_rotated_queries_along(name: str) -> None:
    model = converted(next(case for case in FAMILY_TABLE if case.name == name)).train()
    expected = model(tokens(), labels=tokens(), use_cache=False).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens(), labels=tokens(), use_cache=False).loss
    found.backward()
    assert torch.allclose(found, expected, atol=0.05)


def test_progress_that_was_loaded_is_saved(tmp_path: Path) -> None:
    moved, fresh = converted(), converted(progress=0.0)
    fresh.load_state_dict(moved.state_dict())
    fresh.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(aiether.load(tmp_path).eval()(tokens()).logits, moved(tokens()).logits)


@pytest.mark.parametrize("causal", [True, False])
def test_the_module_knows_nothing_of_padding_nor_of_later_tokens(causal: bool) -> None:
    torch.manual_seed(0)
    module = ToroidalAttention(32, 4, num_key_value_heads=2, causal=causal, platters=2, period=16)
    hidden = torch.randn(1, 10, 32)
    padded = torch.cat([torch.randn(1, 4, 32), hidden], 1)
    present = torch.arange(14)[None] >= 4
    assert torch.allclose(module(padded, present)[:, 4:], module(hidden), atol=1e-6)
    changed = hidden.clone()
    changed[:, 6:] += 1
    same = torch.allclose(module(changed)[:, :6], module(hidden)[:, :6], atol=1e-6)
    assert same is causal


def test_the_module_comes_round_after_a_period() -> None:
    """Rotations are periodic too: each angle makes a whole number of turns in a period."""
    torch.manual_seed(0)
    module = ToroidalAttention(16, 2, causal=False, platters=2, period=8, sinks=0)
    heads = torch.randn(1, 2, 4, 8)
    turned = [
        turn_by_place(heads, torch.arange(4) + start, module.half().turns, 8) for start in (0, 8 * 10**6)
    ]
    assert torch.equal(*turned), "in half precision too"


def test_hidden_tokens_within_a_row_take_no_place_on_the_ring() -> None:
    """As between the turns of a batch of dialogues."""
    model, ids = converted(lambda_distance=6.0, sinks=2), tokens(1, 20)
    hidden = torch.cat([ids[:, :1], ids[:, :5] * 0, ids[:, 1:10], ids[:, :3] * 0, ids[:, 10:]], 1)
    seen = torch.ones_like(hidden)
    seen[0, 1:6], seen[0, 15:18] = 0, 0
    with torch.no_grad():
        found = model(hidden, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)).logits
        assert torch.allclose(found[:, seen[0] > 0], model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_what_a_mask_adds_to_scores_is_added(heads: int) -> None:
    plain, ids = LLAMA.build(depth=2), tokens(2, 16)
    future = torch.ones(16, 16).tril() == 0
    bias = torch.randn(2, heads, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = bias.masked_fill(future, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask).logits
        assert (expected - plain(ids).logits).abs().max() > 0.05, "and it matters"
        assert torch.allclose(converted(progress=1e-7)(ids, attention_mask=mask).logits, expected, atol=1e-4)


def test_a_torus_is_not_left_out_unsaid() -> None:
    model = converted()
    for name in ("sdpa", {"": "eager"}):
        with pytest.raises(ValueError, match="would leave out"):
            model.set_attn_implementation(name)
    model.set_attn_implementation(model.config._attn_implementation)
    assert restore(model).config._attn_implementation == "sdpa"


def bidirectional() -> Any:
    model = LLAMA.build(depth=2)
    model.config.is_causal = False  # type: ignore[attr-defined]
    return model


def encoder() -> Any:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    return BertLMHeadModel(config)


def of_own_sizes() -> Any:
    config = DeepseekV3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "said"),
    [(bidirectional, "later tokens"), (encoder, "later tokens"), (of_own_sizes, "sizes of their own")],
)
def test_attention_of_other_kinds_is_refused(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        aiether.retrofit(build(), layers=[0])


def test_shuffled_places_are_refused_where_a_cache_does_not_know_them() -> None:
    case = next(case for case in FAMILY_TABLE if case.name == "mistral")
    model = case.build(depth=2)
    model.config.sliding_window = 8  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="leave shuffled out"):
        aiether.retrofit(model, layers=[0], shuffled=True)


@pytest.mark.parametrize(
    "wrong",
    [{"platters": 2.0}, {"period": 64.5}, {"sinks": "4"}, {"window": True}, {"gate": "0.5"}, {"shuffled": 1}],
)
def test_settings_of_another_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* is meant|are meant"):
        ToroidalSettings(**wrong)


def test_another_model_of_the_same_configuration_stays_plain() -> None:
    first = LLAMA.build(depth=2)
    second = type(first)(first.config)
    held = first.config.to_dict()
    set_progress(aiether.retrofit(first, layers=[0]), 1.0)
    assert second.config.to_dict() == held
    assert second.config._attn_implementation == "sdpa"
    aiether.retrofit(second, layers=[1])
    restore(first)
    set_progress(second, 0.5)
    assert second.config.toroidal["layers"] == [1]  # type: ignore[attr-defined]


def test_shuffled_places_leave_each_packed_document_its_own_sinks() -> None:
    ids = tokens(1, 40)
    places = torch.cat([torch.arange(20), torch.arange(20)])[None]
    options = {"period": 10, "shuffled": True, "platters": 1, "lambda_range": 1.0, "token_lambda": False}
    found = []
    for strength in (0.0, 8.0):
        model = sharp(lambda_distance=strength, **options)
        with torch.no_grad():
            found.append(model(ids, position_ids=places, use_cache=False).logits[0])
    moved = (found[0] - found[1]).abs().amax(-1)
    assert moved[:4].max() < 1e-4  # sinks alone
    assert moved[20:24].max() < 1e-4
    assert moved[8:20].max() > 1e-2
    assert moved[28:].max() > 1e-2


def test_attention_to_later_tokens_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="is_causal=False"):
        converted()(tokens(), is_causal=False)


@pytest.mark.parametrize(
    ("sizes", "options", "named"),
    [
        ((12, 4), {"platters": 1}, "pairs of dimensions"),
        ((32, 0), {}, "num_heads is 0"),
        ((32, 4), {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ((32, 4), {"dropout": float("nan")}, "dropout is nan"),
        ((32, 4), {"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_modules_that_cannot_be_are_refused(
    sizes: tuple[int, int], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        ToroidalAttention(*sizes, **options)


def test_inputs_that_cannot_be_are_refused() -> None:
    module = ToroidalAttention(32, 4)
    with pytest.raises(ValueError, match="no token"):
        module(torch.randn(2, 0, 32))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        module(torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.long))


def test_parts_of_the_package_are_there_when_asked_for() -> None:
    asked = "import aiether; aiether.toroidal.ToroidalAttention; aiether.evaluation.sum_losses"
    subprocess.run([sys.executable, "-c", asked], check=True)
