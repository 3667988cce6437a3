"""A model that goes on from its cache says what it says about the whole sequence at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from aiether.evaluation.conformance._report import Check
from aiether.evaluation.conformance._trial import Padded, Trial, Worst


def cache_switch(trial: Trial) -> Check:
    """use_cache on or off: the same logits."""
    name = "use_cache on and off"
    if why := no_cache(trial):
        return Check.not_applicable(name, why)
    worst = Worst()
    ids = trial.ids(2)
    worst.see_rows(trial.forward(ids), trial.forward.cached(ids)[0])
    return trial.check(name, worst)


def cache_token_by_token(trial: Trial) -> Check:
    """The first half at once, then one token at a time."""
    half = trial.length // 2
    return _decoded(trial, "cache, token by token", [half, *range(half + 1, trial.length + 1)])


def cache_in_two_parts(trial: Trial) -> Check:
    """A third at once, then the rest at once."""
    return _decoded(trial, "cache, two parts", [max(1, trial.length // 3), trial.length])


def cache_left_padding(trial: Trial) -> Check:
    """Unequal length, padded on the left: the first half at once, then one token at a time."""
    name = "cache, left padding"
    if why := no_cache(trial):
        return Check.not_applicable(name, why)
    if not trial.forward.takes("attention_mask"):
        return Check.not_applicable(name, "forward takes no attention_mask")
    half = trial.length // 2
    padded, worst = Padded.batch(trial, half - 1), Worst()
    stops = [half, *range(half + 1, trial.length + 1)]
    together = _in_parts(trial, padded.ids, stops, padded)
    for row, (start, alone) in enumerate(zip(padded.starts, padded.alone(trial.forward), strict=True)):
        told = f"row {row} after {start} of padding, position"
        worst.see(alone[0], together[row, start:], lambda position, told=told: f"{told} {position}")
    return trial.check(name, worst)


def generation(trial: Trial) -> Check:
    """generate(), greedy, of a batch padded on the left, with a cache and without."""
    name, model = "generate()", trial.model
    can = getattr(model, "can_generate", None)
    if not (callable(can) and can()):
        return Check.not_applicable(name, "the model has no generate() of transformers")
    half, worst = trial.length // 2, Worst()
    padded = Padded.batch(trial, half - 1)
    for use_cache in (True, False):
        if use_cache and no_cache(trial):
            continue
        said, ids = _generate(
            model, padded.ids[:, :half], padded.mask[:, :half], trial.length - half, use_cache
        )
        for row, start in enumerate(padded.starts):
            alone = trial.forward(ids[row : row + 1, start:])[0, half - start - 1 : -1]
            told = f"use_cache={use_cache}, row {row} after {start} of padding, new token"
            worst.see(alone, said[row], lambda position, told=told: f"{told} {position}")
    return trial.check(name, worst)


def no_cache(trial: Trial) -> str:
    """Why the model has no cache that could be checked; empty where it has one."""
    for name in ("past_key_values", "use_cache"):
        if not trial.forward.takes(name):
            return f"forward takes no {name}"
    _, cache = trial.forward.cached(trial.ids(1)[:, :2])
    return "" if cache is not None else "forward with use_cache=True returns no past_key_values"


def _decoded(trial: Trial, name: str, stops: list[int]) -> Check:
    if why := no_cache(trial):
        return Check.not_applicable(name, why)
    worst = Worst()
    ids = trial.ids(2)
    worst.see_rows(trial.forward(ids), _in_parts(trial, ids, stops))
    return trial.check(name, worst)


def _in_parts(trial: Trial, ids_BT: Tensor, stops: list[int], padded: Padded | None = None) -> Tensor:
    """Logits (B, T, V) of stretches that end at `stops`, each after the cache of those before it."""
    parts: list[Tensor] = []
    start, cache = 0, None
    for stop in stops:
        inputs = padded.inputs(stop, start) if padded is not None else {}
        logits, cache = trial.forward.cached(ids_BT[:, start:stop], cache, **inputs)
        parts.append(logits)
        start = stop
    return torch.cat(parts, dim=1)


def _generate(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, count: int, use_cache: bool
) -> tuple[Tensor, Tensor]:
    """Logits (B, count, V) of the new tokens, unprocessed, and all ids (B, T + count)."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        use_cache=use_cache,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = model.generate(ids_BT, attention_mask=mask_BT, generation_config=settings)
    return torch.stack(output.logits, dim=1), output.sequences
