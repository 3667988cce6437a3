from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.adaptive.models import CONDITIONS, lahr, left_padded, tokens
from tests.families import FAMILY_TABLE
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache

from aiether.adaptive import add_mixture_of_depths
from aiether.adaptive.cache import LatentLayer, compact_layer
from aiether.adaptive.routing import Routing
from aiether.adaptive.selection import Budget
from aiether.adaptive.static_cache import StaticCompactLayer

CASES = {case.name: case for case in FAMILY_TABLE}
PADDING = [0, 4, 9]
ROOM = 40


def _decoder(name: str = "llama", depth: int = 4, capacity: float = 0.25, **settings: Any) -> Any:
    model = add_mixture_of_depths(CASES[name].build(depth=depth, **settings), capacity=capacity, burst=3)
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, Routing):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
    return model


def _written(model: Any, cache: str | Cache = "static", rows: int = 3, **given: Any) -> Any:
    """Text behind prompts of unequal length, and what was computed for it."""
    return _generated(model, *left_padded(tokens(rows, 12) % 32, PADDING[:rows]), cache, **given)


def _generated(model: Any, input_ids: Tensor, mask: Tensor, cache: str | Cache, **given: Any) -> Any:
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **given}
    settings |= {"cache_implementation": cache} if isinstance(cache, str) else {"past_key_values": cache}
    torch.manual_seed(3)
    return model.generate(
        input_ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
    )


def _same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for step, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert torch.allclose(one, other, atol=1e-4), step


@pytest.mark.parametrize("router", ["topk", "threshold"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_static_cache_writes_what_a_growing_one_does(condition: str, router: str) -> None:
    model = lahr(condition, router=router, halt_q=0.6, tied=False)
    expected, found = _written(model, "dynamic"), _written(model)
    _same(found, expected)
    assert len(expected.sequences[:, 12:].unique()) > 3, "no loop of one token"
    compact = [layer for layer in found.past_key_values.layers if isinstance(layer, StaticCompactLayer)]
    assert len(compact) == (model.config.routed_layers is not None and sum(model.config.routed_layers))
    for layer in compact:
        assert layer.used_B.tolist() == expected.past_key_values.layers[1].used_B.tolist()
        assert 0 < layer.used_B.sum() < layer.present_B.sum(), "some tokens were left out"


@pytest.mark.parametrize("settings", [{"router": "random"}, {"router": "stride"}, {"capacity": 1.0}])
def test_controls_and_full_capacity_write_the_same_too(settings: dict[str, Any]) -> None:
    model = lahr("full", halt_q=0.6, tied=False, **settings)
    _same(_written(model), _written(model, "dynamic"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_routed_decoder_writes_the_same_with_a_static_cache(implementation: str) -> None:
    model = _decoder()
    model.set_attn_implementation(implementation)
    settings: list[dict[str, Any]] = [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}]
    for given in settings:
        _same(_written(model, **given), _written(model, "dynamic", **given))


def test_a_layer_drops_what_finds_its_budget_spent() -> None:
    model = lahr("mod_only", capacity=0.125, burst=1, slack=1.0, tied=False)
    with torch.no_grad():
        model.model.layers[1].routing.threshold.fill_(-1e9)  # every token is wanted
    found = _written(model, max_new_tokens=29)
    _same(found, _written(model, "dynamic", max_new_tokens=29))
    layer = found.past_key_values.layers[1]
    assert layer.used_B.tolist() == [6, 6, 5], "of 40, 36 and 31 tokens, the last not yet seen"
    assert layer.keys.shape[2] == 16, "columns come by sixteen"


@pytest.mark.parametrize("router", ["topk", "threshold"])
def test_a_static_cache_is_filled_in_pieces_and_again_after_a_reset(router: str) -> None:
    model = lahr("full", router=router, halt_q=0.6, tied=False)
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    addresses: list[int] = []
    for seed in (1, 2):
        input_ids, mask = left_padded(tokens(3, 20, seed=seed), PADDING)
        with torch.no_grad():
            full = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
            found, places = [], [0, 10, 15, *range(16, 21)]
            for begin, end in pairwise(places):
                output = model(
                    input_ids=input_ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache
                )
                found.append(output.logits)
        assert torch.allclose(torch.cat(found, 1)[mask.bool()], full[mask.bool()], atol=1e-4)
        assert addresses in ([], _addresses(cache))
        addresses = _addresses(cache)
        assert len(addresses) == 3 + 5 + 3 * 3
        cache.reset()
        assert int(cache.get_seq_length()) == 0


def test_a_second_call_goes_on_with_a_static_cache_and_is_counted_alike() -> None:
    model = lahr("full", halt_q=0.6, tied=False)
    again, figures = [], []
    for cache in (StaticCache(config=model.config, max_cache_len=ROOM), DynamicCache()):
        model.reset_compute_figures()
        first = _written(model, cache, max_new_tokens=6).sequences
        longer = torch.cat([first, tokens(3, 4, seed=9) % 32], -1)
        figures.append(model.compute_figures())
        mask = left_padded(torch.ones_like(longer), PADDING)[1]
        again.append(_generated(model, longer, mask, cache, max_new_tokens=6))
    _same(*again)
    assert figures[0] == figures[1]
    assert figures[0]["capacity_dropped"] > 0


def _addresses(cache: StaticCache) -> list[int]:
    """Where its tensors are, each of them marked as one that stays there."""
    layers: list[Any] = []
    for layer in cache.layers:
        layers += layer.iterations if isinstance(layer, LatentLayer) else [layer]
    names = ("keys", "values", "cumulative_length", "used_B", "present_B")
    tensors = [getattr(layer, name) for layer in layers for name in names if hasattr(layer, name)]
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("kind", ["lahr", "decoder"])
def test_a_decoding_step_compiles_to_one_graph_for_all_tokens(kind: str) -> None:
    torch._dynamo.reset()
    model = lahr("full", iterations=2, tied=False) if kind == "lahr" else _decoder(depth=2)
    config = CompileConfig(backend="eager", mode="default", fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # type: ignore[assignment]
    expected = _written(model, "dynamic")
    _same(_written(model, compile_config=config), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):  # nor is anything, with another cache
        _same(_written(model, compile_config=config), expected)


def test_caches_that_cannot_be_compact_are_refused_with_advice() -> None:
    model = lahr("full", tied=False)
    for moving in (DynamicCache(offloading=True), StaticCache(model.config, ROOM, offloading=True)):
        with pytest.raises(ValueError, match="offloaded"):
            compact_layer(moving, 0, Budget(0.25, 2), None)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        _written(model, prefill_chunk_size=4)
    filled, input_ids = StaticCache(config=model.config, max_cache_len=ROOM), tokens(2, 5)
    lahr("mod_only")(input_ids=input_ids, past_key_values=filled)
    with pytest.raises(ValueError, match="5 tokens in the layers and 0 in the latent block"):
        model(input_ids=input_ids, past_key_values=filled)


def test_windows_that_reach_over_all_there_is_room_for_need_no_window() -> None:
    with pytest.raises(ValueError, match="window of 4 tokens"):
        _written(_decoder("mistral"))
    model = _decoder("mistral", sliding_window=48)
    _same(_written(model), _written(model, "dynamic"))
