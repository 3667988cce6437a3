"""A sequence over several ranks against the same one whole: outputs and all gradients within 1e-5."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.families import FAMILY_TABLE
from torch import Tensor

import aiether
from aiether.toroidal import (
    Places,
    SequenceShards,
    ToroidalAttention,
    ToroidalSettings,
    TorusTerms,
    kernels,
    ring_attention,
    set_progress,
    sharded,
    toroidal_attention,
    toroidal_ring_attention,
)
from aiether.toroidal.ring import attend_flash

RANKS, HEADS, GROUPS, HEAD_DIM = 4, 2, 1, 8
Found = dict[str, Tensor]


def plain_or_torus(
    shards: SequenceShards | None, *, length: int, rows: int = 2, causal: bool = True, **options: Any
) -> Found:
    """Attention alone, toroidal where there are options; results are of the whole sequence either way."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(rows, heads, length, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    *inputs, weight = (torch.randn(size, generator=generator) for size in sizes)
    if shards is not None:
        inputs, weight = [shards.take(each, 2) for each in inputs], shards.take(weight, 2)
    query, key, value = (each.requires_grad_() for each in inputs)
    learned: dict[str, Tensor] = {}
    places = Places(*[torch.arange(length)] * 2, causal=causal)
    if options:
        chosen = ToroidalSettings(lambda_distance=5.0, **options)
        torch.manual_seed(0)
        terms = TorusTerms(HEADS, HEAD_DIM, chosen)
        terms.set_progress(0.7)
        learned = {name: each for name, each in terms.named_parameters() if "fusion" not in name}
        for each in learned.values():
            torch.nn.init.normal_(each)
        given = (query, key, value, terms(query), chosen)
        if shards is None:
            output = toroidal_attention(*given, places, scale=0.4)
        else:
            output = toroidal_ring_attention(*given, shards, causal=causal, scale=0.4)
        output = output.flatten(3)
    elif shards is None:
        keys, values = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (key, value))
        output = F.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=0.4)
    else:
        output = ring_attention(query, key, value, shards, causal=causal, scale=0.4)
    (output * weight).sum().backward()
    along = {"output": output.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
    if shards is not None:
        shards.sum_gradients(learned.values())
        along = {name: shards.gather(each, 2) for name, each in along.items()}  # type: ignore[arg-type]
    return {**along, **{name: each.grad for name, each in learned.items()}}  # type: ignore[dict-item]


def module(shards: SequenceShards | None, *, length: int, causal: bool) -> Found:
    torch.manual_seed(0)
    attention = ToroidalAttention(16, HEADS, num_key_value_heads=GROUPS, causal=causal, period=24)
    hidden = torch.randn(2, length, 16)
    if shards is None:
        output = attention(hidden)
        output.square().sum().backward()
        found = output.detach()
    else:
        with sharded(shards):
            output = attention(shards.take(hidden))
            output.square().sum().backward()
        shards.sum_gradients(attention.parameters())
        found = shards.gather(output)
    return {"output": found, **gradients_of(attention)}


def decoder(
    shards: SequenceShards | None, *, family: str, layers: list[int], checkpointed: bool = False
) -> Found:
    """Loss, logits and gradients; with one layer converted the other is plain attention over the ranks."""
    case = next(case for case in FAMILY_TABLE if case.name == family)
    model: Any = case.build(depth=2)
    if layers:
        model = aiether.retrofit(model, layers=layers, platters=2, period=16, lambda_distance=4.0)
        set_progress(model, 1.0)
    else:
        model.set_attn_implementation("aiether_toroidal")
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    tokens = torch.randint(1, 32, (2, 32), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(32) < 3, -100)  # a prompt, so that ranks have unequal counts
    if shards is None:
        found = model(tokens, labels=labels)
        found.loss.backward()
        return {"loss": found.loss.detach(), "logits": found.logits.detach(), **gradients_of(model)}
    with sharded(shards, model):
        found = model(shards.take(tokens), **shards.targets(labels))
        found.loss.backward()
    shards.sum_gradients(model.parameters())
    return {
        "loss": shards.total(found.loss.detach()),
        "logits": shards.gather(found.logits.detach()),
        **gradients_of(model),
    }


def gradients_of(model: torch.nn.Module) -> Found:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


ZIGZAG, STRAIGHT, PAIR = {}, {"zigzag": False}, {"members": (1, 3)}
CASES: dict[str, tuple[Callable[..., Found], dict[str, Any]]] = {
    "4096 tokens, plain": (partial(plain_or_torus, length=4096, rows=1), ZIGZAG),
    "4096 tokens, two platters": (partial(plain_or_torus, length=4096, rows=1, platters=2), ZIGZAG),
    "straight": (partial(plain_or_torus, length=40, platters=2, period=16), STRAIGHT),
    "straight, plain": (partial(plain_or_torus, length=40), STRAIGHT),
    "not causal": (partial(plain_or_torus, length=40, causal=False, platters=2, period=16), ZIGZAG),
    "not causal, plain": (partial(plain_or_torus, length=40, causal=False), STRAIGHT),
    "one platter, harmonics": (
        partial(plain_or_torus, length=40, platters=1, period=16, distance="harmonics", token_lambda=False),
        ZIGZAG,
    ),
    "triangle and window": (
        partial(plain_or_torus, length=40, platters=2, period=16, distance="triangle", window=5, sinks=1),
        ZIGZAG,
    ),
    "ranks 1 and 3": (partial(plain_or_torus, length=40, platters=4, platter_rotary=True), PAIR),
    "module": (partial(module, length=40, causal=True), ZIGZAG),
    "module, not causal": (partial(module, length=40, causal=False), STRAIGHT),
    "llama, one layer": (partial(decoder, family="llama", layers=[1]), ZIGZAG),
    "llama, checkpointed": (partial(decoder, family="llama", layers=[0, 1], checkpointed=True), ZIGZAG),
    "gpt2, none": (partial(decoder, family="gpt2", layers=[]), STRAIGHT),
    "phi": (partial(decoder, family="phi", layers=[0, 1]), ZIGZAG),
}


def work(rank: int, store: Path, expected: dict[str, Found], queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    pair = dist.new_group([1, 3])
    kernels.QUERIES = 4  # the eager path recomputes blocks of queries
    errors: dict[str, Any] = {}
    try:
        for name, (compute, how) in CASES.items():
            if rank not in how.get("members", range(RANKS)):
                continue
            length = compute.keywords.get("length", 32)  # type: ignore[attr-defined]
            group = pair if "members" in how else None
            found = compute(SequenceShards(length, group, zigzag=how.get("zigzag", True)))
            assert found.keys() == expected[name].keys()
            errors[name] = {key: error(found[key], right) for key, right in expected[name].items()}
        errors["work"] = [scores(zigzag) for zigzag in (True, False)]
        with pytest.raises(ValueError, match="chunks of one size") as refusal:
            SequenceShards(4100)
        errors["refusal"] = str(refusal.value)
    except Exception:  # noqa: BLE001 - told to the process that waits
        errors["failure"] = traceback.format_exc()
    queue.put((rank, errors))
    dist.destroy_process_group()


def error(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    assert found.dtype == torch.float32
    return float((found - right).abs().max() / right.abs().max().clamp(min=1))


def scores(zigzag: bool) -> tuple[int, int]:
    """Scores that this rank computes of a causal sequence of 40 tokens, and the most keys of one call."""
    sizes: list[tuple[int, int]] = []

    def counting(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Any:
        sizes.append((query.shape[2], key.shape[2]))
        return attend_flash(query, key, value, causal=causal, scale=scale)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("aiether.toroidal.ring.attend_flash", counting)
        given = torch.randn(1, 1, 10, 8)
        ring_attention(given, given, given, SequenceShards(40, zigzag=zigzag), scale=0.4)
    return sum(queries * keys for queries, keys in sizes), max(keys for _, keys in sizes)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks found of all cases; they are started once."""
    expected = {name: compute(None) for name, (compute, _) in CASES.items()}
    context = multiprocessing.get_context("fork")
    queue, store = context.SimpleQueue(), tmp_path_factory.mktemp("ring") / "store"
    processes = [context.Process(target=work, args=(rank, store, expected, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        process.kill()
    by_rank = dict(queue.get() for _ in range(RANKS) if not queue.empty())
    failures = [errors["failure"] for errors in by_rank.values() if "failure" in errors]
    assert not failures, failures[0]
    return [by_rank[rank] for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_device(found: list[dict[str, Any]], name: str) -> None:
    members = CASES[name][1].get("members", range(RANKS))
    for rank in members:
        assert all(value < 1e-5 for value in found[rank][name].values()), found[rank][name]


def test_zigzag_gives_all_ranks_the_same_work_and_no_rank_all_keys(found: list[dict[str, Any]]) -> None:
    zigzag, straight = zip(*(errors["work"] for errors in found), strict=True)
    assert zigzag == ((100 + 3 * 50, 10),) * RANKS
    assert straight == tuple((100 * (rank + 1), 10) for rank in range(RANKS)), "the future is skipped"


def test_uneven_sizes_are_refused_with_sizes_that_go(found: list[dict[str, Any]]) -> None:
    assert all("cut or pack it to 4096 or 4104" in errors["refusal"] for errors in found)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["straight", "triangle and window", "llama, checkpointed"])
def test_one_rank_is_plain(name: str) -> None:
    compute = CASES[name][0]
    length = compute.keywords.get("length", 32)  # type: ignore[attr-defined]
    right = compute(None)
    for key, value in compute(SequenceShards(length)).items():
        assert error(value, right[key]) < 1e-6


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"labels": torch.ones(1, 8, dtype=torch.long)}, "targets"),
        ({"position_ids": torch.arange(1, 9)[None]}, "not those of this rank"),
        ({"attention_mask": torch.arange(8)[None] > 1}, "no padding"),
        ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "leave attention_mask out"),
        ({"input_ids": torch.ones(1, 6, dtype=torch.long)}, "6 tokens here"),
    ],
)
def test_inputs_that_sharding_would_change_are_refused(inputs: dict[str, Any], named: str) -> None:
    model: Any = next(case for case in FAMILY_TABLE if case.name == "llama").build(depth=1)
    model.set_attn_implementation("aiether_toroidal")
    with sharded(SequenceShards(8), model), pytest.raises(ValueError, match=named):
        model(**{"input_ids": torch.ones(1, 8, dtype=torch.long), **inputs})
    assert model(torch.ones(1, 5, dtype=torch.long)).logits.shape[1] == 5, "and outside all is as before"


@pytest.mark.usefixtures("alone")
def test_models_that_cannot_are_refused() -> None:
    case, shards = next(case for case in FAMILY_TABLE if case.name == "llama"), SequenceShards(8)
    with pytest.raises(ValueError, match="does not attend over ranks"), sharded(shards, case.build(depth=1)):
        pass
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model: Any = case.build(depth=1, rope_parameters=rope)
    model.set_attn_implementation("aiether_toroidal")
    with pytest.raises(ValueError, match="yarn"), sharded(shards, model):
        pass
    mistral: Any = next(case for case in FAMILY_TABLE if case.name == "mistral")
    model = mistral.build(depth=1, sliding_window=4)
    model.set_attn_implementation("aiether_toroidal")
    with pytest.raises(ValueError, match="see 4 tokens only"), sharded(shards, model):
        model(torch.ones(1, 8, dtype=torch.long))
    dropping = ToroidalAttention(16, 2, dropout=0.1)
    with pytest.raises(ValueError, match="dropout"), sharded(shards):
        dropping(torch.randn(1, 8, 16))


def test_without_a_process_group_there_is_advice() -> None:
    with pytest.raises(ValueError, match="torchrun"):
        SequenceShards(8)
