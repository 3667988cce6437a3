"""The fused paths against attention by definition: outputs and all gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aiether.toroidal import (
    Places,
    ToroidalAttention,
    ToroidalSettings,
    TorusTerms,
    attend_eager,
    attend_flash,
    distance,
    merge,
    reference_attention,
    toroidal_attention,
)
from aiether.toroidal.attention import choose_backend, cudnn_takes
from aiether.toroidal.distance import ring_distance, ring_waves

HEADS, GROUPS, HEAD_DIM = 4, 2, 24
LONG = 130
"""Queries that are enough for kernels that are planned for a shape."""


def in_line(length: int) -> Places:
    return Places(torch.arange(length), torch.arange(length))


def terms_of(chosen: ToroidalSettings, progress: float = 0.7) -> TorusTerms:
    """Terms away from where they start, so that each has a part in the result."""
    torch.manual_seed(0)
    terms = TorusTerms(HEADS, HEAD_DIM, chosen)
    terms.set_progress(progress)
    for parameter in terms.parameters():
        torch.nn.init.normal_(parameter)
    return terms


def tensors(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, heads, length, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    query, key, value = (
        torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes
    )
    return query, key, value


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, terms: TorusTerms, places: Tensor, allowed: Tensor
) -> Tensor:
    keys, values = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (key, value))
    return reference_attention(
        query,
        keys,
        values,
        terms(query),
        terms.settings,
        query_places=places,
        key_places=places,
        allowed=allowed,
        scale=HEAD_DIM**-0.5,
    )


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((output * weight).sum(), inputs))


FORMS = [
    form
    for form in itertools.product(
        (1, 2, 3), ("chordal", "harmonics", "triangle"), (None, 5), (False, True), ("flash", "eager")
    )
    if not (form[4] == "flash" and (form[1] == "triangle" or form[2]))
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("platters", "distance", "window", "rotary", "backend"), FORMS)
def test_each_path_is_attention_by_definition_with_its_gradients(
    platters: int, distance: Any, window: int | None, rotary: bool, backend: Any, causal: bool
) -> None:
    chosen = ToroidalSettings(
        platters=platters,
        period=16,
        distance=distance,
        lambda_distance=5.0,
        sinks=2,
        window=window,
        platter_rotary=rotary,
        backend=backend,
    )
    terms, (query, key, value), places = terms_of(chosen), tensors(37), torch.arange(37)
    allowed = torch.ones(37, 37, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    expected = by_definition(query, key, value, terms, places, allowed)
    found = toroidal_attention(
        query, key, value, terms(query), chosen, Places(places, places, causal=causal), scale=HEAD_DIM**-0.5
    )
    assert torch.allclose(found, expected, atol=2e-6)
    learned = [p for name, p in terms.named_parameters() if "fusion" not in name]
    inputs = [query, key, value, *learned]
    for mine, right in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert torch.allclose(mine, right, atol=1e-5 * right.abs().max().item() + 1e-7)


def test_rows_of_different_beginnings_are_each_as_they_are_alone() -> None:
    chosen = ToroidalSettings(platters=2, period=16, lambda_distance=8.0)
    terms, (query, key, value) = terms_of(chosen), tensors(12)
    starts = torch.tensor([0, 5])
    places = torch.arange(12) - starts[:, None]
    present = places >= 0
    allowed = present[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    both = toroidal_attention(
        query, key, value, terms(query), chosen, Places(places, places, allowed, causal=False), scale=0.2
    )
    for row, start in enumerate(starts.tolist()):
        asked, told, given = (each[row : row + 1, :, start:] for each in (query, key, value))
        ahead = torch.arange(12 - start)
        expected = toroidal_attention(
            asked, told, given, terms(asked), chosen, Places(ahead, ahead), scale=0.2
        )
        assert torch.allclose(both[row : row + 1, :, start:], expected, atol=1e-6)
    assert both.isfinite().all(), "a query that sees nothing gets 0, not NaN"


def test_nothing_later_changes_what_came_before_however_long_the_sequence_is() -> None:
    chosen = ToroidalSettings(platters=2, period=7, lambda_distance=8.0)
    terms, (query, key, value) = terms_of(chosen, progress=1.0), tensors(30)
    whole = toroidal_attention(query, key, value, terms(query), chosen, in_line(30), scale=0.2)
    asked, told, given = (each[:, :, :11] for each in (query, key, value))
    short = toroidal_attention(asked, told, given, terms(asked), chosen, in_line(11), scale=0.2)
    assert torch.allclose(whole[:, :, :11], short, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 40), sets=st.integers(1, 4), causal=st.booleans(), seed=st.integers(0, 99))
def test_merged_attention_over_parts_is_attention_over_the_whole(
    length: int, sets: int, causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, length, 8, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, sets, 1, 2, length, 8, generator=generator, dtype=torch.float64)
    parts = [attend_flash(query, k, v, causal=causal, scale=0.3) for k, v in zip(keys, values, strict=True)]
    found, log = merge(torch.stack([p[0] for p in parts], 2), torch.stack([p[1] for p in parts], 2))
    mask = torch.ones(length, length, dtype=torch.bool)
    mask = (mask.tril() if causal else mask).repeat(1, sets)
    all_keys, all_values = (torch.cat(list(each), 2) for each in (keys, values))
    expected, expected_log = attend_eager(query, all_keys, all_values, allowed=mask[None, None], scale=0.3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(log.double(), expected_log.double(), atol=1e-5)


def test_the_log_sum_exp_has_its_gradient() -> None:
    query, key, value = tensors(9)
    found = attend_flash(query, key, value, causal=True, scale=0.2)
    scores = torch.einsum("bhnx,bhmx->bhnm", query, key.repeat_interleave(2, dim=1)) * 0.2
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
    expected = torch.softmax(scores, -1) @ value.repeat_interleave(2, dim=1), scores.logsumexp(-1)
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right, atol=1e-6)
    inputs = [query, key, value]
    both = [3 * out.sum() + out.square().sum() + (log * log).sum() for out, log in (found, expected)]
    for mine, right in zip(*(torch.autograd.grad(each, inputs) for each in both), strict=True):
        assert torch.allclose(mine, right, atol=2e-5)


@pytest.mark.parametrize("platters", [1, 2, 4])
def test_values_apart_for_each_platter_are_the_same(platters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's kernels take them, whose place the eager path takes here."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Any:
        assert value.shape[1:] == (HEADS * platters, LONG, HEAD_DIM // platters)
        key, value = (e.repeat_interleave(query.shape[1] // e.shape[1], dim=1) for e in (key, value))
        allowed = torch.ones(LONG, LONG, dtype=torch.bool).tril() if causal else None
        return attend_eager(query, key, value, allowed=allowed, scale=scale)

    monkeypatch.setattr("aiether.toroidal.attention.cudnn_takes", lambda query, settings: True)
    monkeypatch.setattr("aiether.toroidal.attention.attend_cudnn", attend)
    found = []
    for backend in ("flash", "cudnn"):
        chosen = ToroidalSettings(platters=platters, period=16, lambda_distance=5.0, backend=backend)  # type: ignore[arg-type]
        terms, (query, key, value), places = terms_of(chosen), tensors(LONG), in_line(LONG)
        assert choose_backend(chosen, places, query, 0.0) == backend
        output = toroidal_attention(query, key, value, terms(query), chosen, places, scale=0.2)
        learned = [p for name, p in terms.named_parameters() if "fusion" not in name]
        found.append([output, *gradients(output, [query, key, value, *learned])])
    for mine, right in zip(*found, strict=True):
        assert torch.allclose(mine, right, atol=1e-5 * right.abs().max().item() + 1e-7)


def test_cudnn_is_left_alone_where_it_cannot_and_where_queries_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = ToroidalSettings(platters=2, period=16, backend="cudnn")
    query = tensors(LONG)[0]
    with pytest.raises(ValueError, match=r"cudnn.*cpu"):
        choose_backend(chosen, in_line(LONG), query, 0.0)
    monkeypatch.setattr("aiether.toroidal.attention.cudnn_takes", lambda query, settings: True)
    assert choose_backend(chosen, in_line(5), query[:, :, :5], 0.0) == "flash"
    masked = replace(in_line(LONG), allowed=torch.ones(LONG, LONG, dtype=torch.bool))
    assert choose_backend(chosen, masked, query, 0.0) == "eager"


@pytest.mark.parametrize(("kind", "most"), [("chordal", 119), ("harmonics", 101)])
def test_cudnn_takes_heads_that_its_kernels_hold_with_the_distance(
    kind: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.toroidal.attention.flash_takes", lambda query: True)
    monkeypatch.setattr("aiether.toroidal.attention._HAS_CUDNN", True)
    chosen = ToroidalSettings(distance=kind)

    def query(size: int, device: str = "cuda") -> Any:
        return SimpleNamespace(shape=(1, 2, 200, size), device=torch.device(device))

    assert [cudnn_takes(query(size), chosen) for size in (most, most + 1)] == [True, False]
    assert not cudnn_takes(query(64, "cpu"), chosen)


def test_queries_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ToroidalSettings(platters=2, period=16, distance="triangle")
    terms, (query, key, value), places = terms_of(chosen), tensors(37), in_line(37)
    inputs = [query, key, value]
    found = []
    for size in (512, 8):
        monkeypatch.setattr("aiether.toroidal.kernels.QUERIES", size)
        output = toroidal_attention(query, key, value, terms(query), chosen, places, scale=0.2)
        found.append([output, *gradients(output, inputs)])
    for mine, right in zip(*found, strict=True):
        assert torch.allclose(mine, right, atol=1e-5)


def test_dropout_keeps_the_mean_and_is_eager() -> None:
    chosen = ToroidalSettings(platters=2, period=16)
    terms, (query, key, value), places = terms_of(chosen), tensors(6), in_line(6)
    plain = toroidal_attention(query, key, value, terms(query), chosen, places, scale=0.2)
    with torch.no_grad():
        dropped = torch.stack(
            [
                toroidal_attention(query, key, value, terms(query), chosen, places, scale=0.2, dropout=0.3)
                for _ in range(600)
            ]
        )
    assert (dropped[0] - plain).abs().max() > 0.05
    assert (dropped.mean(0) - plain).abs().mean() < 0.05


@pytest.mark.parametrize("kind", ["chordal", "harmonics", "triangle"])
def test_distance_is_half_at_half_a_period_and_comes_round(kind: Any) -> None:
    steps = torch.arange(-40, 40)
    far = ring_distance(steps, 16, kind)
    assert torch.allclose(far, ring_distance(steps + 16, 16, kind), atol=1e-6)
    assert torch.allclose(far, ring_distance(-steps, 16, kind), atol=1e-6)
    exact = 0.013 if kind == "harmonics" else 1e-6
    assert abs(ring_distance(torch.tensor(8), 16, kind).item() - 0.5) <= exact
    assert abs(ring_distance(torch.tensor(0), 16, kind).item()) <= exact
    assert (far - ring_distance(steps, 16, "triangle")).abs().max() <= (0.11 if kind == "chordal" else exact)


class NoDouble(TorchDispatchMode):
    """A device that lacks float64, as Apple's does; "meta" stands for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert not (isinstance(found, Tensor) and found.is_meta and found.dtype == torch.float64)
        return found


@pytest.mark.parametrize("kind", ["chordal", "triangle", "harmonics"])
def test_a_device_without_double_precision_gets_the_same_numbers(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = torch.tensor([[0, 1, 7], [2047, 2048, 3_000_001]])
    expected = ring_distance(places - 5, 2048, kind), ring_waves(places, 2048, kind)
    monkeypatch.setattr(distance, "_holds_float64", lambda device: device.type != "meta", raising=False)
    with NoDouble():
        found = ring_distance(places.to("meta"), 2048, kind), ring_waves(places.to("meta"), 2048, kind)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in expected]
    monkeypatch.setattr(distance, "_holds_float64", lambda device: False)
    whole = torch.compile(
        lambda x: (ring_distance(x - 5, 2048, kind), ring_waves(x, 2048, kind)),
        backend="eager",
        fullgraph=True,
    )
    assert all(torch.equal(*pair) for pair in zip(whole(places), expected, strict=True))


def test_waves_of_late_places_are_as_exact_as_of_early_ones() -> None:
    places = torch.arange(16)
    assert torch.equal(ring_waves(places, 16, "harmonics"), ring_waves(places + 16 * 10**9, 16, "harmonics"))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"platters": 0}, "platters is 0"),
        ({"distance": "far"}, "chordal, triangle, harmonics"),
        ({"gate": 1.5}, "gate is 1.5"),
        ({"lambda_range": 0.5}, "lambda_range is 0.5"),
        ({"window": 0}, "window is 0"),
        ({"backend": "flash", "distance": "triangle"}, "takes neither"),
        ({"backend": "cudnn", "window": 4}, "takes neither"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ToroidalSettings(**wrong)


def test_platters_that_do_not_divide_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of 1, 2, 3, 4, 6, 8, 12"):
        TorusTerms(2, 24, ToroidalSettings(platters=5))


def test_a_backend_that_cannot_is_named() -> None:
    chosen = ToroidalSettings(backend="flex")
    terms, (query, key, value) = terms_of(chosen), tensors(4)
    with pytest.raises(ValueError, match="'flex' cannot compute this on cpu"):
        toroidal_attention(query, key, value, terms(query), chosen, in_line(4), scale=0.2)


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that anything made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("padded", [False, True])
def test_the_eager_path_makes_nothing_for_each_pair_of_tokens(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.toroidal.kernels.QUERIES", 8)
    length = 600
    module = ToroidalAttention(16, 1, platters=1, distance="triangle", window=50, period=200, backend="eager")
    present = torch.arange(length)[None] >= 3 if padded else None
    with Largest() as largest:
        module(torch.randn(1, length, 16), present).sum().backward()
    assert 8 * length <= largest.entries < length * length / 10


@pytest.mark.parametrize("backend", ["flash", "eager"])
def test_a_gate_has_a_gradient_where_one_asks_for_it(backend: Any) -> None:
    chosen = ToroidalSettings(platters=2, period=16, backend=backend, platter_rotary=True)
    query, key, value = tensors(20)
    order, found = torch.arange(20), []
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    for way in ("path", "definition"):
        terms = replace(terms_of(chosen)(query), gate=torch.tensor(0.3, requires_grad=True))
        if way == "path":
            output = toroidal_attention(query, key, value, terms, chosen, in_line(20), scale=HEAD_DIM**-0.5)
        else:
            keys, values = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (key, value))
            output = reference_attention(
                query, keys, values, terms, chosen, query_places=order, key_places=order, allowed=allowed,
                scale=HEAD_DIM**-0.5,
            )  # fmt: skip
        found.append(gradients(output, [terms.gate])[0])
    assert torch.allclose(found[0], found[1], rtol=1e-4), found


def test_the_eager_path_has_second_derivatives() -> None:
    chosen = ToroidalSettings(platters=2, period=16, backend="eager", platter_rotary=True)
    terms = terms_of(chosen).double()
    query, key, value = (each[:1, :, :5].detach().requires_grad_() for each in tensors(6, torch.float64))

    def attend(query: Tensor) -> Tensor:
        told = replace(terms(query), lambda_BHN=torch.ones(1, HEADS, 5))
        return toroidal_attention(query, key, value, told, chosen, in_line(5), scale=0.2)

    (once,) = torch.autograd.grad(attend(query).square().sum(), query, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), query)
    moved = query.detach() + 1e-2 * twice / twice.norm()
    (there,) = torch.autograd.grad(attend(moved.requires_grad_()).square().sum(), moved)
    rise = (there.square().sum() - once.square().sum()).item()
    assert rise == pytest.approx(1e-2 * twice.norm().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_query_of_zeros_has_a_gradient(dtype: torch.dtype) -> None:
    terms = terms_of(ToroidalSettings(platters=1, period=16))
    query = torch.randn(1, HEADS, 6, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    query[:, :, 3] = 0
    query.requires_grad_()
    found = terms(query).lambda_BHN
    assert found[:, :, 3].isfinite().all()
    grads = torch.autograd.grad(found.sum(), [query, *terms.parameters()], allow_unused=True)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    assert not grads[0][:, :, 3].any()


def test_no_tokens_lambda_lies_beyond_what_is_told() -> None:
    terms, query = terms_of(ToroidalSettings(lambda_distance=4.0)), 5 * tensors(50)[0]
    low, high = terms.token_bounds()
    found = terms(query).lambda_BHN
    assert (found >= low[:, None] - 1e-5).all()
    assert (found <= high[:, None] + 1e-5).all()
    assert terms.lambda_token is not None
    terms.lambda_token.data[0] *= 100  # along the first query of the first head, it comes next to its bound
    along = terms.lambda_token.data[0].expand(1, HEADS, 1, -1)
    assert torch.allclose(terms(along).lambda_BHN[0, 0, 0], terms.token_bounds()[1][0], rtol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_sinks_are_counted_from_where_a_querys_document_begins(masked: bool) -> None:
    chosen = ToroidalSettings(platters=2, period=16, lambda_distance=5.0, sinks=2)
    terms, (query, key, value), order = terms_of(chosen), tensors(20), torch.arange(20)
    first = torch.where(order < 8, 0, 8)[None]
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    allowed = allowed & (order >= first[0, :, None]) if masked else allowed
    places = Places(order, order, allowed if masked else None, causal=not masked, first=first)
    found = toroidal_attention(query, key, value, terms(query), chosen, places, scale=0.2)
    keys, values = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (key, value))
    given: dict[str, Any] = {"query_places": order, "key_places": order, "allowed": allowed, "scale": 0.2}
    expected = reference_attention(query, keys, values, terms(query), chosen, **given, first=first)
    assert torch.allclose(found, expected, atol=1e-5)
    without = reference_attention(query, keys, values, terms(query), chosen, **given)
    assert not torch.allclose(without, expected, atol=1e-3)
