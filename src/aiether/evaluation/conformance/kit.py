"""The conformance kit: every check on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from aiether.evaluation._forward import evaluating
from aiether.evaluation.conformance import batches, caching, causality, gradients
from aiether.evaluation.conformance._preserve import exact_float32, in_float32, preserved, quiet
from aiether.evaluation.conformance._report import Check, ConformanceReport
from aiether.evaluation.conformance._trial import Trial

LENGTH, SHORTEST = 32, 8

CHECKS: dict[str, Callable[[Trial], Check]] = {
    "later tokens": causality.later_tokens,
    "shorter input": causality.shorter_input,
    "row in a batch": batches.row_in_a_batch,
    "left padding": batches.left_padding,
    "use_cache on and off": caching.cache_switch,
    "cache, token by token": caching.cache_token_by_token,
    "cache, two parts": caching.cache_in_two_parts,
    "cache, left padding": caching.cache_left_padding,
    "generate()": caching.generation,
    "gradient": gradients.gradient,
}
"""Every check by its name, in the order in which they are made."""


def check_conformance(
    model: nn.Module,
    *,
    vocab_size: int | None = None,
    length: int | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    checks: Iterable[str] | None = None,
) -> ConformanceReport:
    """Whether a model is causal, decodes from its cache what it says at once, and learns in every parameter.

    Logits are compared in evaluation mode and in float32 (without TF32 and autocast); gradients are taken in
    training mode. A model in another dtype is copied to float32 for it. Afterwards modes, gradients, buffers,
    weights and torch's random state are what they were.

    Parameters
    ----------
    model: `forward` takes `input_ids` (B, T), int64, and returns logits (B, T, V) or an object with
        `.logits`. Where it takes `attention_mask`, `position_ids`, `past_key_values` and `use_cache`, as the
        models of transformers do, what these promise is checked too.
    vocab_size: ids are drawn below it; None: the configuration's, else the rows of the input embeddings.
    length: tokens of a sequence; None: 32, or the model's context if that is shorter. Attention windows are
        seen only by sequences that are longer.
    seed: what the sequences are drawn with.
    tolerance: how far two logits that should be equal may be apart; for logits above ten, a tenth of it times
        the largest. That nothing later is seen is always held to a tenth of it times the largest logit.
    checks: names out of `CHECKS`; None: all.

    Raises
    ------
    ValueError
        For an encoder-decoder, a model without a known vocabulary, logits of another shape, a length that the
        model does not take, and names that are no checks.
    """
    names = _chosen(checks)
    _refuse(model, tolerance)
    checked = in_float32(model)
    trial = Trial(checked, _vocabulary(model, vocab_size), _length(model, length), seed, tolerance)
    with preserved(checked), exact_float32(), quiet():
        found = tuple(_made(CHECKS[name], trial) for name in names)
    return ConformanceReport(
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        length=trial.length,
        seed=seed,
        checks=found,
        note="" if checked is model else "checked as a copy in float32",
    )


def _made(check: Callable[[Trial], Check], trial: Trial) -> Check:
    with evaluating(trial.model):
        return check(trial)


def _chosen(checks: Iterable[str] | None) -> tuple[str, ...]:
    names = tuple(CHECKS if checks is None else checks)
    unknown = [name for name in names if name not in CHECKS]
    if unknown or not names:
        fault = f"names {unknown[0]!r}" if unknown else "is empty"
        raise ValueError(f"checks {fault}; choose among {', '.join(map(repr, CHECKS))}")
    return names


def _refuse(model: nn.Module, tolerance: float) -> None:
    if getattr(_config(model), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; the kit is for causal (decoder-only) models"
        )
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be above 0")


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _vocabulary(model: nn.Module, given: int | None) -> int:
    size = given if given is not None else getattr(_config(model), "vocab_size", None)
    if size is None and callable(embeddings := getattr(model, "get_input_embeddings", None)):
        size = getattr(embeddings(), "num_embeddings", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(model).__name__} does not say how many ids it knows; give vocab_size")
    if size < 2:
        raise ValueError(f"vocab_size is {size}; at least 2 ids are needed")
    return size


def _length(model: nn.Module, given: int | None) -> int:
    most = getattr(_config(model), "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else None  # XLNet's -1: no limit
    length = min(LENGTH, most or LENGTH) if given is None else given
    if length < SHORTEST or (most is not None and length > most):
        allowed = f"{SHORTEST} or more" if most is None else f"{SHORTEST} to {most}, the model's context"
        raise ValueError(f"length is {length}; allowed is {allowed}")
    return length
