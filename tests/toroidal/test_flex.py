"""FlexAttention's path, by its own uncompiled form, since there is no GPU: kept masks, few kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aiether.toroidal import Places, ToroidalSettings, flex, toroidal_attention
from aiether.toroidal.attention import choose_backend

from .test_attention import HEAD_DIM, by_definition, gradients, in_line, tensors, terms_of


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path as it is, but for its kernel: torch computes the same step by step, with gradients."""
    monkeypatch.setattr("aiether.toroidal.attention.flex_takes", lambda query: True)
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *given: None)
    monkeypatch.setattr(flex, "_forms", set())
    flex._kept_block_mask.cache_clear()
    torch._dynamo.reset()  # another test's shapes would leave this one's open


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("platters", "distance", "window", "causal"),
    [(2, "triangle", None, True), (1, "chordal", 20, True), (2, "harmonics", 20, False)],
)
def test_it_is_attention_by_definition_with_its_gradients(
    platters: int, distance: Any, window: int | None, causal: bool
) -> None:
    chosen = ToroidalSettings(
        platters=platters, period=100, distance=distance, lambda_distance=5.0, sinks=2, window=window,
        backend="flex",
    )  # fmt: skip
    length = 140
    terms, (query, key, value), places = terms_of(chosen), tensors(length), torch.arange(length)
    allowed = torch.ones(length, length, dtype=torch.bool)
    expected = by_definition(query, key, value, terms, places, allowed.tril() if causal else allowed)
    found = toroidal_attention(
        query, key, value, terms(query), chosen, Places(places, places, causal=causal), scale=HEAD_DIM**-0.5
    )
    assert len(flex._forms) == 1, "and it is this path"
    assert torch.allclose(found, expected, atol=2e-6)
    inputs = [query, key, value, *(p for name, p in terms.named_parameters() if "fusion" not in name)]
    for mine, right in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert torch.allclose(mine, right, atol=1e-5 * right.abs().max().item() + 1e-7)


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (256, 384), (128, 500)])
@pytest.mark.parametrize("window", [None, 30])
def test_blocks_are_those_of_the_whole_mask(queries: int, keys: int, window: int | None) -> None:
    order = torch.arange(keys)
    places = Places(order[keys - queries :], order, causal=queries == keys)
    sight = flex._sight(ToroidalSettings(period=250, window=window, sinks=3), places)
    expected = torch_flex.create_block_mask(flex._seen(sight), None, None, queries, keys, device="cpu")
    found = flex.block_mask(sight)
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for blocks in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(found, blocks), getattr(expected, blocks)), blocks


def test_masks_are_kept_by_what_they_depend_on() -> None:
    flex._kept_block_mask.cache_clear()

    def mask(length: int = 256, known_by: Any = "line", **options: Any) -> Any:
        order = torch.arange(length)
        settings = ToroidalSettings(**{"period": 100, "window": 20, **options})
        return flex._kept_block_mask(flex._sight(settings, Places(order, order, known_by=known_by)))

    assert mask() is mask()
    others: list[dict[str, Any]] = [{"length": 257}, {"known_by": "ring"}, {"shuffled": True}]
    others += [{"period": 101}, {"window": 21}, {"sinks": 0}]
    assert len({id(mask(**other)) for other in others} | {id(mask())}) == 1 + len(others)
    for length in range(128, 180):
        mask(length)
    assert flex._kept_block_mask.cache_info().currsize <= 16


@pytest.mark.usefixtures("on_cpu")
def test_few_queries_and_further_shapes_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_MOST_FORMS", 2)
    chosen = ToroidalSettings(window=20, backend="flex")

    def path(queries: int, keys: int) -> str:
        order = torch.arange(keys)
        places = Places(order[keys - queries :], order, causal=queries == keys)
        return choose_backend(chosen, places, torch.empty(1, 2, queries, 32), 0.0)

    assert [path(1, keys) for keys in range(200, 230)] == ["eager"] * 30
    assert [path(128, 128), path(200, 200), path(300, 300), path(200, 200)] == ["flex"] * 2 + [
        "eager",
        "flex",
    ]


@pytest.mark.usefixtures("on_cpu")
def test_under_a_mode_that_watches_operations_nothing_is_compiled() -> None:
    """Nothing can be, and without its kernel FlexAttention fails there."""
    order = torch.arange(200)
    places, query = Places(order, order), torch.empty(1, 2, 200, 32)
    with FlopCounterMode(display=False):
        assert choose_backend(ToroidalSettings(window=20), places, query, 0.0) == "eager"
    assert choose_backend(ToroidalSettings(window=20), places, query, 0.0) == "flex"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_a_query_alone_is_what_it_is_among_many() -> None:
    """Decoding goes another path than the whole."""
    chosen = ToroidalSettings(platters=2, period=50, window=20, sinks=2, backend="flex")
    terms, (query, key, value) = terms_of(chosen), tensors(140)
    whole = attend(query, key, value, terms(query), chosen, in_line(140))
    last, order = query[:, :, -1:], torch.arange(140)
    alone = attend(last, key, value, terms(last), chosen, Places(order[-1:], order, causal=False))
    assert torch.allclose(whole[:, :, -1:], alone, atol=1e-6)


def attend(*given: Any) -> Tensor:
    return toroidal_attention(*given, scale=0.2)
