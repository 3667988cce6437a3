from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adaptive.models import lahr, left_padded, tokens
from tests.families import FAMILY_TABLE
from torch import Tensor, nn

from aiether.adaptive import add_mixture_of_depths, routed_layer
from aiether.adaptive.cache import CompactLayer
from aiether.adaptive.routing import Routing

PADDING = [0, 3, 11, 7]
LENGTH, PROMPT = 60, 12


def _text(vocabulary: int = 37) -> tuple[Tensor, Tensor]:
    return left_padded(tokens(4, LENGTH) % (vocabulary - 1) + 1, PADDING)


def _converted(name: str, **settings: Any) -> Any:
    case = next(case for case in FAMILY_TABLE if case.name == name)
    model = add_mixture_of_depths(case.build(depth=2), **settings)
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, Routing):
            nn.init.normal_(module.weight, std=0.5)
    return model


@torch.no_grad()
def _token_by_token(model: Any, vocabulary: int = 37) -> tuple[Tensor, CompactLayer]:
    """Logits behind a prompt, with turns that bring several tokens, are taken back, or sort rows anew."""
    input_ids, mask = _text(vocabulary)

    def read(begin: int, end: int, cache: Any) -> Any:
        places = (mask[:, :end].cumsum(-1) - 1).clamp_min(0)[:, begin:]
        return model(
            input_ids=input_ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )

    output = read(0, PROMPT, None)
    cache, found, at, cropped = output.past_key_values, [], PROMPT, False
    while at < LENGTH:
        width = 3 if at == 40 else 1
        found.append(read(at, at + width, cache).logits)
        at += width
        if at == 25 and not cropped and not cache.layers[0].is_sliding:  # which transformers cannot crop
            cache.crop(-4)
            at, cropped = at - 4, True
        if at in (30, 50):
            order = torch.tensor([2, 0, 3, 1])
            input_ids, mask = input_ids[order], mask[order]
            cache.reorder_cache(order)
    return torch.cat(found, 1), cache.layers[1]


@pytest.mark.parametrize(
    "model",
    [
        lambda: lahr("mod_only", burst=1, slack=1.0),
        lambda: lahr("mod_only", predictor="head", burst=1),
        lambda: lahr("full", router="threshold", halt_q=0.6),
        lambda: lahr("mod_only", router="random"),
        lambda: lahr("mod_only", router="stride"),
        lambda: lahr("mod_only", capacity=1.0),
        lambda: _converted("mistral", capacity=0.5, burst=1),
        lambda: _converted("gpt2", capacity=0.25),
    ],
    ids=["topk", "head", "threshold", "random", "stride", "all", "window", "tuples"],
)
def test_one_token_at_a_time_is_what_whole_passes_compute(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = model()
    vocabulary = routed.config.vocab_size
    light, lightly = _token_by_token(routed, vocabulary)
    with monkeypatch.context() as patch:
        patch.setattr(routed_layer, "is_one_token", lambda *_: False)
        whole, wholly = _token_by_token(routed, vocabulary)
    assert torch.allclose(light, whole, atol=1e-5)
    assert torch.equal(lightly.used_B, wholly.used_B)
    assert torch.equal(lightly.present_B, wholly.present_B)
    assert lightly.keys is not None
    assert wholly.keys is not None
    for row, used in enumerate(lightly.used_B.tolist()):
        assert torch.equal(lightly.places_BC[row, :used], wholly.places_BC[row, :used])
        assert torch.allclose(lightly.keys[row, :, :used], wholly.keys[row, :, :used], atol=1e-5)
    taken = lightly.used_B.sum() / lightly.present_B.sum()
    assert taken == 1 if routed.config.routing["capacity"] == 1 else 0.1 < taken < 0.7


@torch.no_grad()
def test_only_rows_that_want_a_layer_run_it_and_none_where_no_row_does() -> None:
    model, (input_ids, mask) = lahr("mod_only", capacity=0.125, burst=1), _text()
    layer = model.model.layers[1]
    layer.routing.threshold.fill_(0.4)
    rows: list[int] = []
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    cache, before, expected = None, torch.zeros(4, dtype=torch.long), []
    for begin, end in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))):
        cache = model(
            input_ids=input_ids[:, begin:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        ).past_key_values
        used = cache.layers[1].used_B
        expected.append(int((used > before).sum()))
        before = used
    assert rows[1:] == [count for count in expected[1:] if count]
    assert {0, 1, 2} <= set(expected[1:]), expected


def test_training_gradients_and_counting_take_the_whole_pass() -> None:
    model, (input_ids, mask) = lahr("mod_only"), _text()
    given: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    cache = model(input_ids=input_ids[:, :-1], **given | {"attention_mask": mask[:, :-1]}).past_key_values
    model(input_ids=input_ids[:, -1:], past_key_values=cache, **given).logits.sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None
    model.reset_compute_figures()
    with torch.no_grad():
        cache = model(input_ids=input_ids[:, :-1], **given | {"attention_mask": mask[:, :-1]}).past_key_values
        model(input_ids=input_ids[:, -1:], past_key_values=cache, **given)
    assert int(model.model.layers[1].routing.figures[0]) == int(mask.sum())


def test_a_cache_filled_in_inference_mode_goes_on_without_it() -> None:
    model, (input_ids, mask) = lahr("mod_only", capacity=1.0), _text()
    with torch.inference_mode():
        cache = model(
            input_ids=input_ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True
        ).past_key_values
    with torch.no_grad():
        found = model(input_ids=input_ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
        full = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found[:, 0], full[:, -1], atol=1e-5)
