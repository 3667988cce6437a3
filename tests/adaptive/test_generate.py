from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adaptive.models import lahr, left_padded, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from aiether.adaptive.cache import CompactLayer, LatentLayer

NEW = 8
BOTH = pytest.mark.parametrize(("condition", "router"), [("full", "topk"), ("full", "threshold")])


def _generated(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **given}
    mask = torch.ones_like(input_ids) if mask is None else mask
    return model.generate(input_ids, attention_mask=mask, **settings)  # type: ignore[operator]


@BOTH
def test_greedy_text_is_what_a_loop_without_cache_writes(condition: str, router: str) -> None:
    model, input_ids = lahr(condition, router=router, halt_q=0.6, tied=False), tokens(2, 9)
    expected = input_ids
    for _ in range(NEW):
        with torch.no_grad():
            chosen = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, chosen[:, None]], -1)
    assert torch.equal(_generated(model, input_ids), expected)
    assert len(expected[:, 9:].unique()) > 3, "no loop of one token"


@BOTH
def test_rows_of_unequal_length_are_written_as_if_alone(condition: str, router: str) -> None:
    model, padding = lahr(condition, router=router, halt_q=0.6, tied=False), [0, 4, 9]
    padded, mask = left_padded(tokens(3, 12), padding)
    together = _generated(model, padded, mask)
    for row, count in enumerate(padding):
        assert torch.equal(_generated(model, padded[row : row + 1, count:])[0], together[row, count:])


@BOTH
def test_sampling_follows_its_seed_and_beams_do_without_a_cache(condition: str, router: str) -> None:
    model, (padded, mask) = (
        lahr(condition, router=router, halt_q=0.6, tied=False),
        left_padded(tokens(2, 9), [0, 5]),
    )
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(_generated(model, padded, mask, do_sample=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    beams = [_generated(model, padded, mask, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(beams[0], beams[1])


def test_assisted_text_is_greedy_text() -> None:
    model, assistant, input_ids = (
        lahr("full", halt_q=0.6, tied=False),
        lahr("full", halt_q=0.6, tied=False),
        tokens(1, 9),
    )
    with torch.no_grad():  # right now and then: what it guesses wrong is cropped from the caches
        assistant.lm_head.weight[::3] += 0.02
    assert torch.equal(_generated(model, input_ids, assistant_model=assistant), _generated(model, input_ids))


@BOTH
def test_a_cropped_cache_is_that_of_the_shorter_text(condition: str, router: str) -> None:
    model, (padded, mask) = lahr(condition, router=router, tied=False), left_padded(tokens(3, 20), [0, 3, 8])
    with torch.no_grad():
        cache = model(input_ids=padded[:, :16], attention_mask=mask[:, :16], use_cache=True).past_key_values
        cache.crop(-5)
        assert cache.get_seq_length() == 11
        found = model(
            input_ids=padded[:, 11:], attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
        full = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found, full[:, 11:], atol=1e-5)


@BOTH
def test_a_cache_goes_on_in_a_second_call_and_is_empty_after_a_reset(condition: str, router: str) -> None:
    model, input_ids, cache = lahr(condition, router=router, tied=False), tokens(2, 9), DynamicCache()
    first = _generated(model, input_ids, past_key_values=cache)
    longer = torch.cat([first, tokens(2, 4, seed=7)], -1)
    again = _generated(model, longer, past_key_values=cache)
    assert torch.equal(again, _generated(model, longer))
    cache.reset()
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if isinstance(layer, CompactLayer | LatentLayer):
            assert layer.get_seq_length() == 0
        elif layer.get_seq_length():  # older versions of transformers reset the contents of theirs alone
            layers[index] = DynamicLayer()
    other = tokens(3, 5, seed=8)  # another number of rows, too
    assert torch.equal(_generated(model, other, past_key_values=cache), _generated(model, other))


def test_a_routed_layer_keeps_its_own_tokens_only() -> None:
    model, input_ids = lahr("mod_only", capacity=0.125, burst=1, slack=1.0), tokens(2, 33)
    with torch.no_grad():
        model.model.layers[1].routing.threshold.fill_(-1e9)  # type: ignore[union-attr]
        cache = model(input_ids=input_ids, use_cache=True).past_key_values
    dense, compact = cache.layers
    assert dense.keys.shape[2] == 33
    assert isinstance(compact, CompactLayer)
    assert compact.used_B.tolist() == [6, 6]
    assert compact.keys is not None
    assert compact.keys.shape[2] == 16, "places come by sixteen"
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert compact.used_B.tolist() == [6] * 3
    assert torch.equal(compact.keys[0], compact.keys[2])


def test_a_cache_of_another_kind_is_refused() -> None:
    for condition in ("mod_only", "latent_only"):
        model = lahr(condition)
        filled = DynamicCache(config=model.config)
        for layer in range(2):
            filled.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), layer)
        with pytest.raises(ValueError, match="DynamicCache"):
            model(input_ids=tokens(1, 5), past_key_values=filled)


def test_the_latent_blocks_cache_lies_behind_those_of_the_layers() -> None:
    model = lahr("full", iterations=3)
    cache = model(input_ids=tokens(2, 7), use_cache=True).past_key_values
    assert len(cache.layers) == 3
    assert isinstance(cache.layers[2], LatentLayer)
    assert cache.layers[2].get_seq_length() == 7
    assert cache.layers[2].get_mask_sizes(1) == (8, 0)
