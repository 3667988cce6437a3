from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adaptive.models import CONDITIONS, VOCAB, gradients, lahr, lahr_config, left_padded, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aiether.adaptive import LahrConfig, LahrForCausalLM
from aiether.adaptive.masks import attention_mask

ROUTED = [*((name, "topk") for name in CONDITIONS), ("full", "threshold"), ("mod_only", "threshold")]
"""Conditions and causal routers."""
BOTH = pytest.mark.parametrize(("condition", "router"), ROUTED)


def _logits(model: LahrForCausalLM, input_ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **{"use_cache": False, **given}).logits


def test_the_baseline_is_llama_bit_by_bit() -> None:
    baseline, input_ids = lahr("baseline"), tokens()
    config = {k: v for k, v in baseline.config.to_dict().items() if k != "model_type"}
    llama = LlamaForCausalLM(LlamaConfig(**config))
    llama.load_state_dict(baseline.state_dict())
    assert {n: p.shape for n, p in llama.named_parameters()} == {
        n: p.shape for n, p in baseline.named_parameters()
    }
    for model in (llama, baseline):
        model.train()
    found, expected = (m(input_ids=input_ids, labels=input_ids) for m in (baseline, llama))
    assert torch.equal(found.logits, expected.logits)
    assert torch.allclose(found.loss, expected.loss, atol=1e-6)
    padded, mask = left_padded(input_ids, [0, 3, 8])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    found, expected = (
        m.eval()(input_ids=padded, attention_mask=mask, position_ids=places).logits for m in (baseline, llama)
    )
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_parameters_by_a_closed_form(condition: str, positions: str) -> None:
    depth, width, feed, heads, keys, size, slots = 4, 16, 24, 2, 4, 64, 16
    block = 4 * width**2 + 3 * width * feed + 2 * width
    parts = {
        "mod": (depth // 2) * (width + 1),
        "latent": block + 3 * width + width + width + 2,
        "memory": width
        + width * heads * 2 * size
        + heads * 2 * keys * size
        + heads
        + slots * width
        + 2 * width**2,
    }
    dense = VOCAB * width + depth * block + width + (64 * width if positions == "learned" else 0)
    model = lahr(condition, depth=depth, positions=positions)
    named = {"full": "mod latent memory", "no_mod": "latent memory", "no_latent": "mod memory"}
    named |= {"no_memory": "mod latent", "baseline": ""}
    expected = dense + sum(
        parts[part] for part in named.get(condition, condition.removesuffix("_only")).split()
    )
    assert sum(p.numel() for p in model.parameters()) == expected
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for part in ("mod", "latent", "memory"):
        inside = {"mod": "routing", "latent": "latent", "memory": "memory"}[part]
        assert any(inside in name for name in names) == (part in named.get(condition, condition))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_saved_and_loaded_it_is_the_same_bit_by_bit(condition: str, tmp_path: Path) -> None:
    router = "threshold" if condition in ("full", "mod_only") else "topk"
    model, input_ids = lahr(condition, router=router).train(), tokens()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    model(input_ids=input_ids, labels=input_ids)
    model.save_pretrained(tmp_path)
    loaded, auto = LahrForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(auto) is LahrForCausalLM
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LahrConfig)
    for other in (loaded, auto):
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
        assert torch.equal(_logits(other, input_ids), _logits(model.eval(), input_ids))
    other = loaded.train()
    found, expected = (m(input_ids=input_ids, labels=input_ids).loss for m in (other, model.train()))
    assert torch.equal(found, expected), "training goes on with the same draws"


def test_what_a_checkpoint_lacks_is_initialised_and_not_left_as_memory_was(tmp_path: Path) -> None:
    lahr("baseline").save_pretrained(tmp_path)
    grown: Any = LahrForCausalLM.from_pretrained(tmp_path, config=lahr_config("full", router="threshold"))
    assert all(tensor.isfinite().all() for tensor in grown.state_dict().values())
    latent, routing = grown.model.latent, grown.model.layers[1].routing
    assert (latent.steps == 0).all()
    assert (latent.halt_weight == 0).all()
    assert routing.threshold == 0
    assert routing.weight.abs().max() > 0
    assert (routing.figures == 0).all()
    assert torch.allclose(grown.model.memory.log_temperature, torch.tensor(10.0).log())


@BOTH
def test_causality_caches_and_padding(condition: str, router: str) -> None:
    model, input_ids = lahr(condition, router=router, halt_q=0.6), tokens(3, 24)
    full = _logits(model, input_ids)
    changed = torch.cat([input_ids[:, :13], tokens(3, 11, seed=9)], -1)
    assert torch.equal(_logits(model, changed)[:, :13], full[:, :13])
    assert torch.allclose(_logits(model, input_ids[:, :13]), full[:, :13], atol=1e-5)
    padding = [0, 5, 11]
    padded, mask = left_padded(input_ids, padding)
    alone = [_logits(model, input_ids[row : row + 1, count:]) for row, count in enumerate(padding)]
    found = _logits(model, padded, attention_mask=mask)
    for row, count in enumerate(padding):
        assert torch.allclose(found[row, count:], alone[row][0], atol=1e-5)
    pieces, cache = [], None
    with torch.no_grad():
        for begin, end in ((0, 12), (12, 17), *((t, t + 1) for t in range(17, 24))):
            output = model(
                input_ids=padded[:, begin:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, 1)[mask.bool()], found[mask.bool()], atol=1e-5)


@BOTH
def test_every_parameter_gets_gradient_and_checkpointing_changes_none(condition: str, router: str) -> None:
    model, input_ids = lahr(condition, router=router).train(), tokens(3, 24)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    for _ in range(2):  # thresholds and draws move on between passes, and inside none
        for each in (model, other):
            each.zero_grad()
            each(input_ids=input_ids, labels=input_ids).loss.backward()
    plain, recomputed = gradients(model), gradients(other)
    assert plain.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, recomputed[name]), name
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


def test_random_routing_is_recomputed_as_it_was() -> None:
    model, input_ids = lahr("mod_only", router="random").train(), tokens(3, 24)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    for _ in range(2):
        for each in (model, other):
            each.zero_grad()
            each(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(torch.equal(g, gradients(other)[name]) for name, g in gradients(model).items())


@pytest.mark.parametrize("condition", ["full", "baseline"])
def test_losses_of_labels_that_do_not_count(condition: str) -> None:
    model, input_ids = lahr(condition).train(), tokens()
    nothing = torch.full_like(input_ids, -100)
    loss = model(input_ids=input_ids, labels=nothing).loss
    loss.backward()
    assert loss == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    model.eval()
    half = input_ids.clone()
    half[:, :10] = -100
    found = model(input_ids=input_ids, labels=half).loss
    logits = _logits(model, input_ids)[:, 9:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 10:].flatten())
    assert torch.allclose(found, expected, atol=1e-6)
    counted = model(input_ids=input_ids, labels=half, num_items_in_batch=torch.tensor(60)).loss
    assert torch.allclose(counted, expected / 2, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_train_as_they_would_alone(attention: str) -> None:
    model, padding = lahr("no_latent", capacity=0.3).train(), [0, 5, 11, 20]  # the last row holds nothing
    model.set_attn_implementation(attention)
    padded, mask = left_padded(tokens(4, 20), padding)
    labels = padded.masked_fill(mask == 0, -100)
    labels[torch.arange(3), padding[:3]] = -100  # what is predicted from padding
    total = model(input_ids=padded, attention_mask=mask, labels=labels, num_items_in_batch=1).loss
    total.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    alone = [
        model(
            input_ids=padded[row : row + 1, count:],
            labels=labels[row : row + 1, count:],
            num_items_in_batch=1,
        )
        for row, count in enumerate(padding[:3])
    ]
    assert torch.allclose(total, torch.stack([each.loss for each in alone]).sum(), rtol=1e-5)


def test_embeddings_may_be_given_and_positions_too() -> None:
    model, input_ids = lahr("full"), tokens()
    full = _logits(model, input_ids)
    embedded = model.get_input_embeddings()(input_ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, full)
    places = torch.arange(20)[None]
    assert torch.equal(_logits(model, input_ids, position_ids=places), full)
    assert torch.allclose(_logits(model, input_ids, position_ids=places + 17), full, atol=1e-4), "rotary"
    with pytest.raises(ValueError, match="either"):
        model(input_ids=input_ids, inputs_embeds=embedded)


@pytest.mark.parametrize("condition", ["baseline", "mod_only", "latent_only"])
def test_packed_documents_do_not_see_each_other(condition: str) -> None:
    model, input_ids = lahr(condition, capacity=1.0, halting="fixed"), tokens(2, 20)
    places = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    packed = _logits(model, input_ids, position_ids=places)
    assert torch.allclose(packed[:, :8], _logits(model, input_ids[:, :8]), atol=1e-5)
    assert torch.allclose(packed[:, 8:], _logits(model, input_ids[:, 8:]), atol=1e-5)


def test_hidden_states_are_given_and_half_precision_runs() -> None:
    model, input_ids = lahr("full", depth=4), tokens()
    output = model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 5
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    loss, logits = model(input_ids=input_ids, labels=input_ids, use_cache=False, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert loss.ndim == 0
    half = model.to(torch.bfloat16).train()
    half(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(half).values())
    assert half.eval()(input_ids=input_ids).logits.dtype == torch.bfloat16


def test_autocast_decides_as_a_full_pass_does() -> None:
    model, input_ids = lahr("mod_only", router="threshold").train(), tokens(4, 32)
    model(input_ids=input_ids)
    model.eval().reset_compute_figures()
    exact = _logits(model, input_ids)
    capacity = model.compute_figures()["capacity"]
    model.reset_compute_figures()
    with torch.autocast("cpu", torch.bfloat16):
        found = _logits(model, input_ids)
    assert model.compute_figures()["capacity"] == pytest.approx(capacity, abs=0.02)
    assert (found - exact).abs().mean() < 0.1 * exact.std()


def test_training_without_gradient_moves_nothing_on() -> None:
    model, input_ids = lahr("full", router="threshold").train(), tokens()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = model(input_ids=input_ids, labels=input_ids).loss
        assert torch.equal(model(input_ids=input_ids, labels=input_ids).loss, first)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert model(input_ids=input_ids, labels=input_ids).loss.requires_grad
    assert not torch.equal(model.model.latent.passes, state["model.latent.passes"])


def test_a_copy_lives_on_its_own() -> None:
    model, input_ids = lahr("full").train(), tokens()
    average = copy.deepcopy(model).eval()
    before = _logits(average, input_ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert torch.equal(_logits(average, input_ids), before)
    assert not torch.equal(_logits(model.eval(), input_ids), before)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="'sdpa' and 'eager'"):
        attention_mask(None, 3, "flex_attention", torch.zeros(1))
    with pytest.raises(ValueError, match="flex"):
        lahr("mod_only").set_attn_implementation("flex_attention")


@pytest.mark.parametrize("condition", ["full", "baseline"])
def test_eager_attention_agrees(condition: str) -> None:
    model, (input_ids, mask) = lahr(condition), left_padded(tokens(), [0, 4, 9])
    found = _logits(model, input_ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    assert torch.allclose(
        _logits(model, input_ids, attention_mask=mask)[mask.bool()], found[mask.bool()], atol=1e-5
    )


@pytest.mark.parametrize("condition", ["full", "latent_only"])
def test_a_reentrant_checkpoint_gives_the_same_gradients(condition: str) -> None:
    """It passes none through a tuple in a tuple, as keys and values of a latent block once were."""
    found = []
    for checkpointed in (False, True):
        model = lahr(condition).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model(tokens(), labels=tokens()).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6), name


def test_the_head_is_tied_unless_asked_otherwise() -> None:
    shape: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2}
    model = LahrForCausalLM(LahrConfig(**shape, num_hidden_layers=2, intermediate_size=24))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_routers_stay_in_single_precision_when_a_model_is_loaded_in_half(tmp_path: Path) -> None:
    """In half precision a threshold stops following once its steps are small."""
    lahr("mod_only").save_pretrained(tmp_path)
    model: Any = LahrForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    routed = {kind for name, kind in kinds.items() if "routing" in name and "followed" not in name}
    assert routed == {torch.float32}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"latent": {"bogus": 1}}, "latent has no setting 'bogus'"),
        ({"routing": {"capacity": 0.1}}, "no layer is routed"),
    ],
)
def test_parts_that_cannot_be_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LahrForCausalLM(LahrConfig(vocab_size=30, hidden_size=16, num_attention_heads=2, **wrong))


def test_a_text_beyond_learned_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="has learned 64 positions"):
        lahr("baseline", positions="learned")(tokens(1, 65))
