"""The distance as further dimensions: what is kept of it between calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aiether.toroidal import Places, ToroidalSettings, TorusTerms, toroidal_attention
from aiether.toroidal.waves import in_halves, waves_of

SETTINGS = ToroidalSettings(platters=2, period=16, lambda_distance=5.0, sinks=2, backend="flash")


def attended(settings: ToroidalSettings, places: Places, scale: float = 0.25) -> tuple[Tensor, Tensor]:
    """What is attended to, and the queries' gradient."""
    torch.manual_seed(0)
    terms = TorusTerms(2, 16, settings)
    terms.set_progress(1.0)
    query, key, value = torch.randn(3, 1, 2, len(places.key), 16)
    query.requires_grad_()
    output = toroidal_attention(query, key, value, terms(query), settings, places, scale=scale)
    if not output.requires_grad:
        return output, torch.zeros(())
    (grad,) = torch.autograd.grad(output.square().sum(), query)
    return output.detach(), grad


CHANGES: list[dict[str, Any]] = [
    {"period": 20},
    {"sinks": 5},
    {"distance": "harmonics"},
    {"shuffled": True},
    {"lambda_distance": 1.0},
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_of_one_torus_is_not_taken_for_another(change: dict[str, Any]) -> None:
    order = torch.arange(40)
    changed = replace(SETTINGS, **change)
    for settings in (SETTINGS, changed):
        for scale in (0.25, 0.5):
            kept = attended(settings, Places(order, order, known_by="line"), scale)
            anew = attended(settings, Places(order, order), scale)
            assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    line = Places(order, order, known_by="line")
    assert not torch.equal(attended(SETTINGS, line)[0], attended(changed, line)[0])


def test_what_is_kept_in_one_type_is_not_taken_in_another() -> None:
    order = torch.arange(40)
    settings = replace(SETTINGS, period=17)

    def told(places: Places, dtype: torch.dtype) -> Tensor:
        return waves_of(settings, places, 0.25, dtype)[1]

    places = Places(order, order, known_by="line")
    half, single = told(places, torch.bfloat16), told(places, torch.float32)
    assert (half.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert told(places, torch.float32) is single, "and what is kept is taken"
    few = Places(order[-4:], order, causal=False, known_by="line")
    assert told(few, torch.float32) is not told(few, torch.float32), "while decoding nothing is"


def test_what_was_kept_in_inference_mode_can_be_trained_with() -> None:
    def places() -> Places:
        return Places(torch.arange(33), torch.arange(33), known_by="met in inference mode first")

    with torch.inference_mode():
        attended(SETTINGS, places())
    _, grad = attended(SETTINGS, places())
    assert grad.abs().sum() > 0


def test_what_was_only_traced_is_not_kept() -> None:
    def places() -> Places:
        return Places(torch.arange(34), torch.arange(34), known_by="met as a stand-in first")

    with FakeTensorMode():
        attended(SETTINGS, places())
    assert attended(SETTINGS, places())[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_two_halves_a_product_is_as_exact_as_in_twice_the_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one, other = torch.rand(2, 1000) + 0.5
    asked = in_halves(one[:, None], dtype, (0, 0, 1)).double()
    told = in_halves(other[:, None], dtype, (0, 1, 0)).double()
    error = (asked * told).sum(-1) - one.double() * other.double()
    assert error.abs().max() < 4 * torch.finfo(dtype).eps ** 2
