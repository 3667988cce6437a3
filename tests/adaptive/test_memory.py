from __future__ import annotations

import itertools
import math

import pytest
import torch

from aiether.adaptive import MemorySettings, ProductKeyMemory
from aiether.adaptive.memory import bag_read, indices_by_maxima, product_read

WIDTH = 8


def _memory(**settings: int) -> ProductKeyMemory:
    torch.manual_seed(0)
    memory = ProductKeyMemory(
        WIDTH, MemorySettings(**{"keys": 5, "heads": 3, "top_k": 4, "key_size": 6, **settings})
    )
    with torch.no_grad():
        memory.log_temperature.normal_(1.0, 0.3)
        memory.norm.weight.normal_(1.0, 0.2)
    return memory


def test_it_reads_what_a_search_through_all_slots_would_read() -> None:
    memory, hidden = _memory().double(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    settings, found = memory.settings, memory(hidden)
    for row, token in itertools.product(range(2), range(3)):
        normed = memory.norm(hidden[row, token])
        queries = memory.query(normed).view(settings.heads, 2, settings.key_size)
        read = torch.zeros(WIDTH, dtype=torch.float64)
        for head in range(settings.heads):
            scores = torch.empty(settings.keys**2, dtype=torch.float64)
            for first, second in itertools.product(range(settings.keys), repeat=2):
                halves = [
                    torch.nn.functional.cosine_similarity(
                        queries[head, half], memory.keys[head, half, key], dim=0
                    )
                    for half, key in enumerate((first, second))
                ]
                scores[first * settings.keys + second] = sum(halves) * memory.log_temperature[head].exp()
            best = scores.topk(settings.top_k)
            read += best.values.softmax(0) @ memory.values.weight[best.indices]
        expected = memory.output(torch.nn.functional.silu(memory.gate(normed)) * read)
        assert torch.allclose(found[row, token], expected, atol=1e-5)


def test_reading_as_a_product_gives_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    slots = torch.randint(6, (5, 2, 4))  # heads often read the same slot
    given = [torch.randn(5, 2, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)]
    found = []
    for read in (bag_read, product_read):
        weights, values = (each.clone().requires_grad_() for each in given)
        output = read(slots, weights, values)
        output.sin().sum().backward()
        found.append((output, weights.grad, values.grad))
    for bag, product in zip(*found, strict=True):
        assert torch.allclose(bag, product, atol=1e-12)


def test_the_highest_are_found_by_maxima_as_by_sorting() -> None:
    scores = torch.randn(7, 3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(indices_by_maxima(scores, 8), scores.topk(8).indices)
    assert torch.equal(indices_by_maxima(torch.zeros(2, 5), 5), torch.arange(5).expand(2, 5))


def test_everything_in_it_gets_gradient() -> None:
    memory = _memory()
    memory(torch.randn(4, 30, WIDTH)).square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert memory.keys.grad is not None
    assert (memory.keys.grad.abs().sum((-1, -2)) > 0).all(), "both halves of every head"
    assert memory.log_temperature.grad is not None
    assert (memory.log_temperature.grad != 0).all()


def test_usage_counts_reads_without_padding() -> None:
    memory, hidden = _memory(), torch.randn(3, 10, WIDTH)
    present = torch.arange(10) < torch.tensor([[10], [4], [0]])
    memory.reset_usage()
    memory(hidden, present)
    assert memory.usage.sum() == 0, "not asked for"
    memory.counting = True
    memory(hidden, present)
    slots, _ = memory.read(memory.norm(hidden[present]))
    assert torch.equal(memory.usage, torch.bincount(slots.flatten(), minlength=25))
    figures = memory.usage_figures()
    used = len(slots.unique()) / 25
    assert figures["memory_used"] == pytest.approx(used)
    assert figures["memory_dead"] == pytest.approx(1 - used)
    shares = memory.usage[memory.usage > 0].double() / memory.usage.sum()
    entropy = -(shares * shares.log()).sum().item() / math.log(25)
    assert figures["memory_entropy"] == pytest.approx(entropy)
    memory.usage.fill_(7)
    assert memory.usage_figures()["memory_entropy"] == pytest.approx(1)
    memory.usage.zero_()[3] = 9
    assert memory.usage_figures() == {
        "memory_used": 0.04,
        "memory_dead": 0.96,
        "memory_entropy": pytest.approx(0, abs=1e-9),
    }


def test_a_half_precision_pass_finds_the_same_slots() -> None:
    memory = _memory(keys=12, key_size=16)
    normed = torch.randn(64, WIDTH)
    queries = memory.query(normed)
    memory.query = torch.nn.Identity()  # type: ignore[assignment]  # what differs is the search alone
    slots, weights = memory.read(queries)
    with torch.autocast("cpu", torch.bfloat16):
        again, half = memory.read(queries)
    assert torch.equal(again, slots)
    assert torch.equal(half, weights)


def test_it_runs_in_bfloat16() -> None:
    memory = _memory().to(torch.bfloat16)
    output = memory(torch.randn(2, 4, WIDTH, dtype=torch.bfloat16))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


@pytest.mark.parametrize("wrong", [{"keys": 0}, {"heads": 0}, {"top_k": 9, "keys": 4}, {"key_size": 0}])
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MemorySettings(**wrong)
