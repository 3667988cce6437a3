"""What a GPU's kernels compute, in half precision, is attention by definition, in memory that grows with N.

A CPU has kernels of some of them; without a GPU these are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.families import FAMILY_TABLE
from torch import Tensor

import aiether
from aiether.evaluation import count_forward_flops
from aiether.toroidal import (
    Places,
    ToroidalAttention,
    ToroidalSettings,
    TorusTerms,
    flex,
    reference_attention,
    set_progress,
    toroidal_attention,
)
from aiether.toroidal.attention import choose_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
HEADS, GROUPS, LENGTH = 4, 2, 300
Found = dict[str, Tensor]


def terms_of(chosen: ToroidalSettings, size: int) -> TorusTerms:
    """Terms away from where they start, so that each has a part in the result."""
    torch.manual_seed(0)
    terms = TorusTerms(HEADS, size, chosen)
    terms.set_progress(1.0)
    for parameter in terms.parameters():
        torch.nn.init.normal_(parameter)
    return terms.to(DEVICE)


def tensors(size: int, dtype: torch.dtype, length: int = LENGTH, rows: int = 2) -> list[Tensor]:
    """Query, key and value, numbers of bfloat16 in any case, so that all types begin with the same."""
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(rows, h, length, size, generator=generator) for h in (HEADS, GROUPS, GROUPS)]
    return [each.bfloat16().to(DEVICE, dtype).requires_grad_() for each in given]


def in_line(length: int, causal: bool = True) -> Places:
    order = torch.arange(length, device=DEVICE)
    return Places(order, order, causal=causal, known_by=(length, length))


def results(output: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: TorusTerms | None) -> Found:
    """The output and all gradients, those of lambda, beta and Omega among them."""
    output = output if terms is None else terms.fuse(output).flatten(3)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    learned = {} if terms is None else dict(terms.named_parameters())
    inputs = {"query": query, "key": key, "value": value, **learned}
    grads = torch.autograd.grad((output * weight).sum(), list(inputs.values()))
    return {"output": output.detach(), **dict(zip(inputs, grads, strict=True))}


def by_definition(chosen: ToroidalSettings, size: int, causal: bool) -> Found:
    """In float64, slowly."""
    query, key, value = tensors(size, torch.float64)
    terms, order = terms_of(chosen, size).double(), torch.arange(LENGTH, device=DEVICE)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE)
    keys, values = for_heads(key), for_heads(value)
    output = reference_attention(
        query, keys, values, terms(query), chosen, query_places=order, key_places=order,
        allowed=allowed.tril() if causal else allowed, scale=size**-0.5,
    )  # fmt: skip
    return results(output, query, key, value, terms)


def for_heads(shared: Tensor) -> Tensor:
    return shared.repeat_interleave(HEADS // GROUPS, dim=1)


def fused(chosen: ToroidalSettings, size: int, causal: bool, dtype: torch.dtype, path: str) -> Found:
    """On the path that is named."""
    query, key, value = tensors(size, dtype)
    terms, places = terms_of(chosen, size), in_line(LENGTH, causal)
    assert choose_backend(chosen, places, query, 0.0) == path
    output = toroidal_attention(query, key, value, terms(query), chosen, places, scale=size**-0.5)
    return results(output, query, key, value, terms)


def error(found: Found, right: Found) -> dict[str, float]:
    """The largest difference of each tensor, relative to its largest entry."""
    assert found.keys() == right.keys()
    differences = {name: (found[name].double() - each).abs().max() for name, each in right.items()}
    return {name: float(each / right[name].abs().max()) for name, each in differences.items()}


def assert_close(found: Found, right: Found, bound: float) -> None:
    """Within the bound; a head's one number is a sum over all tokens whose parts cancel: three times it."""
    errors = error(found, right)
    assert all(e < bound * (3 if right[name].numel() == HEADS else 1) for name, e in errors.items()), errors


def plain_error(size: int) -> float:
    """What plain attention in bfloat16 is off by itself."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        query, key, value = tensors(size, dtype)
        output = F.scaled_dot_product_attention(query, for_heads(key), for_heads(value), is_causal=True)
        found.append(results(output, query, key, value, None))
    return max(error(*found).values())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distance", ["chordal", "harmonics"])
@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("platters", [1, 2, 4])
@pytest.mark.parametrize("path", ["flash", pytest.param("cudnn", marks=needs_gpu)])
def test_fused_it_is_attention_by_definition_as_exactly_as_plain_attention_is(
    path: Any, platters: int, size: int, distance: Any, causal: bool
) -> None:
    asked: Any = "auto" if path == "flash" else path
    chosen = ToroidalSettings(
        platters=platters, period=100, distance=distance, lambda_distance=4.0, backend=asked
    )
    found = fused(chosen, size, causal, torch.bfloat16, path)
    assert found["output"].dtype == torch.bfloat16
    bound = 4 * plain_error(size)
    assert bound < 0.05
    assert_close(found, by_definition(chosen, size, causal), bound)


FORMS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({"platters": 2, "distance": "triangle"}, torch.float32),
    ({"platters": 1, "distance": "harmonics", "window": 40}, torch.bfloat16),
]


@needs_gpu
@pytest.mark.parametrize(("options", "dtype"), FORMS, ids=["triangle", "window"])
def test_flex_is_attention_by_definition(options: dict[str, Any], dtype: torch.dtype) -> None:
    chosen = ToroidalSettings(period=100, lambda_distance=4.0, **options)
    bound = 1e-4 if dtype == torch.float32 else 4 * plain_error(64)
    assert_close(fused(chosen, 64, True, dtype, "flex"), by_definition(chosen, 64, True), bound)


@pytest.mark.parametrize("options", [{"platters": 2}, {"platters": 2, "distance": "triangle", "window": 40}])
@torch.no_grad()
def test_nothing_later_changes_what_came_before_nor_does_the_length(options: dict[str, Any]) -> None:
    chosen, short = ToroidalSettings(period=100, lambda_distance=4.0, **options), 170
    terms, (query, key, value) = terms_of(chosen, 64), tensors(64, torch.bfloat16)
    attend = partial(toroidal_attention, settings=chosen, scale=0.125)

    def whole(key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, terms(query), places=in_line(LENGTH))

    late = (torch.arange(LENGTH, device=DEVICE) >= short)[:, None]
    before, after = whole(key, value), whole(key + 3 * late, value - 3 * late)
    assert torch.equal(before[:, :, :short], after[:, :, :short])
    assert not torch.equal(before[:, :, short:], after[:, :, short:])
    asked, told, given = (each[:, :, :short] for each in (query, key, value))
    alone = attend(asked, told, given, terms(asked), places=in_line(short))
    assert torch.allclose(alone.float(), before[:, :, :short].float(), atol=0.02, rtol=0.02)
    last, order = query[:, :, -1:], torch.arange(LENGTH, device=DEVICE)
    decoded = attend(last, key, value, terms(last), places=Places(order[-1:], order, causal=False))
    same = torch.allclose(decoded.float(), before[:, :, -1:].float(), atol=0.02, rtol=0.02)
    assert same, "decoding goes another path"


def forward_and_backward(length: int, **options: Any) -> None:
    chosen = ToroidalSettings(period=2048, **options)
    terms, (query, key, value) = terms_of(chosen, 64), tensors(64, torch.bfloat16, length, rows=1)
    output = toroidal_attention(query, key, value, terms(query), chosen, in_line(length), scale=0.125)
    results(output, query, key, value, terms)


def make_block_mask(length: int) -> None:
    flex.block_mask(flex._sight(ToroidalSettings(window=256), in_line(length)))


def peak(compute: Callable[[int], None], length: int) -> int:
    compute(length)  # what is made once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compute(length)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@needs_gpu
@pytest.mark.parametrize(
    "compute",
    [
        partial(forward_and_backward, platters=1),
        partial(forward_and_backward, platters=2),
        partial(forward_and_backward, platters=2, backend="cudnn"),
        partial(forward_and_backward, platters=2, distance="triangle", window=256, backend="eager"),
        make_block_mask,
    ],
    ids=["D=1", "D=2", "D=2, cuDNN", "eager", "block mask"],
)
def test_memory_grows_with_the_length_not_with_its_square(compute: Callable[[int], None]) -> None:
    short, long = (peak(compute, length) for length in (4096, 16384))
    assert long < 5 * short, (short, long)


def in_half(name: str) -> tuple[Any, Tensor]:
    case = next(case for case in FAMILY_TABLE if case.name == name)
    ids = torch.randint(1, 32, (2, 24), generator=torch.Generator().manual_seed(0))
    model: Any = case.build(depth=2)
    return model.to(DEVICE, torch.bfloat16), ids.to(DEVICE)


@pytest.mark.parametrize("name", ["llama", "phi"])
@torch.no_grad()
def test_a_converted_decoder_is_the_one_that_it_was_and_decodes_what_it_computes_whole(name: str) -> None:
    model, ids = in_half(name)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    masks = (None, mask)
    before = [model(ids, attention_mask=each).logits for each in masks]
    aiether.retrofit(model, layers=[0, 1], platters=2, period=16, lambda_distance=4.0)
    assert all(
        torch.equal(model(ids, attention_mask=m).logits, b) for m, b in zip(masks, before, strict=True)
    )
    set_progress(model, 1.0)
    moved = model(ids).logits
    assert (moved - before[0]).abs().max() > 0.01
    for each in masks:
        made = model.generate(
            ids, attention_mask=each, max_new_tokens=8, min_new_tokens=8, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        ones = None if each is None else F.pad(each, (0, 8), value=1)
        whole = model(made.sequences, attention_mask=ones).logits[:, 23:-1].float()
        step_by_step = torch.stack(made.logits, 1).float()
        assert torch.allclose(step_by_step, whole, atol=0.05 * float(whole.abs().max()))


def test_autocast_trains_a_converted_decoder_on_the_flash_path() -> None:
    model, ids = in_half("phi")
    model.float().train()
    aiether.retrofit(model, layers=[0, 1], platters=2, period=16)
    set_progress(model, 1.0)
    expected = model(ids, labels=ids, use_cache=False).loss
    with torch.autocast(DEVICE, torch.bfloat16):
        found = model(ids, labels=ids, use_cache=False).loss
    found.backward()
    assert torch.allclose(found, expected, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_its_operations_are_counted_in_any_type() -> None:
    """In float32 a GPU takes FlexAttention, which a counter of operations cannot look into."""
    model, _ = in_half("llama")
    model.float()
    ids, counted = torch.ones(1, 200, dtype=torch.long, device=DEVICE), []
    for layers in ([], [0]):
        if layers:
            aiether.retrofit(model, layers=layers, platters=2, period=100, distance="triangle")
            set_progress(model, 1.0)
        counted.append(count_forward_flops(model, ids))
    assert counted[1] > 1.05 * counted[0]


@needs_gpu
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_compiled_into_one_graph_it_computes_the_same(backend: Any) -> None:
    torch.manual_seed(0)
    module = ToroidalAttention(
        128, HEADS, num_key_value_heads=GROUPS, platters=2, period=100, backend=backend
    )
    for parameter in module.torus.parameters():
        torch.nn.init.normal_(parameter)
    module.to(DEVICE, torch.bfloat16)
    hidden, found = torch.randn(2, LENGTH, 128).to(DEVICE, torch.bfloat16), []
    for attend in (module, torch.compile(module, fullgraph=True)):
        module.zero_grad()
        output = attend(hidden)
        output.float().square().sum().backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append({"output": output.detach(), **grads})
    assert_close(found[1], found[0], 0.05)
