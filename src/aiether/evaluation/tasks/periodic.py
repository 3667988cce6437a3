"""Sequences that repeat after P tokens, with noise: what a torus of that period should be good at."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import torch
from torch import Tensor, nn

from aiether.evaluation.loss import LossSums, sum_losses


def split_periods(low: int, high: int, held_out: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Periods to train on and `held_out` others, both ascending, of those from `low` to `high`.

    A sequence of period P has the periods 2P, 3P and so on too: multiples of a held-out period are not
    trained on either.

    Raises ValueError where nothing would be left to train on, and for a period below 1.
    """
    if not 1 <= low <= high or not 0 <= held_out <= high - low:
        raise ValueError(
            f"{held_out} of the periods {low} to {high} are to be held out; periods begin at 1, and at least "
            "one must be left to train on"
        )
    kept_back = sorted(Random(seed).sample(range(low, high + 1), held_out))
    trained = [period for period in range(low, high + 1) if all(period % each for each in kept_back)]
    if not trained:
        raise ValueError(
            f"every period from {low} to {high} is a multiple of a held-out one ({kept_back}); hold out "
            "fewer, or take another seed"
        )
    return trained, kept_back


def periodic_windows(
    period: int, *, length: int, vocab_size: int, number: int, noise: float = 0.0, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Sequences of one period, and which of their tokens can be known: windows for `sum_losses`.

    Each repeats random ids of its own, of which a share `noise` is replaced by other ids. A token can be
    known if it is not replaced and has stood, not replaced, in an earlier repeat. The sequences of a period
    depend on the seed and on nothing else that is asked for; of more sequences the first are the same.

    Returns `number` pairs of int64 (length,) and bool (length,).

    Raises
    ------
    ValueError
        For a period that does not repeat within the length, and settings out of range.
    """
    if not 1 <= period < length:
        raise ValueError(f"period is {period}; it must be 1 to {length - 1} to repeat in {length} tokens")
    if vocab_size < 2 or not 0 <= noise < 1:
        raise ValueError(
            f"vocab_size is {vocab_size} and noise {noise}; at least 2, and 0 to below 1, is meant"
        )
    made = []
    for index in range(number):
        generator = torch.Generator().manual_seed(Random(f"{seed} {period} {index}").getrandbits(63))
        pattern = torch.randint(vocab_size, (period,), generator=generator)
        places = torch.arange(length)
        replaced = torch.rand(length, generator=generator) < noise
        others = torch.randint(1, vocab_size, (length,), generator=generator)
        ids = (pattern[places % period] + others * replaced) % vocab_size
        made.append((ids, ~replaced & _stood_before(~replaced, period)))
    return made


def _stood_before(clean_T: Tensor, period: int) -> Tensor:
    """Where one of the tokens one, two, ... periods before is clean."""
    missing = -len(clean_T) % period
    repeats = torch.nn.functional.pad(clean_T, (0, missing)).view(-1, period).long()
    return (repeats.cumsum(0) - repeats > 0).flatten()[: len(clean_T)]


def losses_by_period(
    model: nn.Module,
    periods: Iterable[int],
    *,
    length: int,
    vocab_size: int,
    number: int = 8,
    noise: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[int, LossSums]:
    """The loss of a model on what can be known of sequences of each period; see `periodic_windows`."""
    settings = {"length": length, "vocab_size": vocab_size, "number": number, "noise": noise, "seed": seed}
    return {
        period: sum_losses(model, periodic_windows(period, **settings), batch_size=batch_size)
        for period in periods
    }
