"""Pass key retrieval: a number in the middle of a long text that says nothing, asked for at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby, islice
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of, evaluating

FILLER = (
    " The boats went out in the morning and the harbour was quiet. The water was calm, and the nets came "
    "back half full. In the evening the lamps were lit along the quay, and nobody was in a hurry."
)
BEFORE, AFTER = " The pass key is", ". Keep the pass key in mind."
QUESTION = " What was the pass key? The pass key is"


class Wording(NamedTuple):
    """The parts of one prompt, as ids. `filler` gives as many as are asked for."""

    filler: Callable[[int], list[int]]
    before: list[int]
    answer: list[int]
    after: list[int]
    question: list[int]


@dataclass(frozen=True)
class Passkey:
    """One prompt and its answer.

    Attributes
    ----------
    ids: int64 (length,): text, key, text, question, and the answer at the end.
    answer: how many of the last ids are the answer.
    depth: where the key is hidden: 0 at the beginning, 1 right before the question.
    """

    ids: Tensor
    answer: int
    depth: float


class PasskeyCell(NamedTuple):
    """How many of the trials at a length and a depth were right, every token of them."""

    length: int
    depth: float
    right: int
    trials: int


def text_wording(encode: Callable[[str], Sequence[int]], digits: int = 5) -> Callable[[Random], Wording]:
    """English, in a tokenizer's ids; `encode` adds no special tokens. Parts are encoded one by one, so that
    the key has the same ids in the text and in the answer."""
    before, after, question, text = (list(encode(part)) for part in (BEFORE, AFTER, QUESTION, FILLER))

    def drawn(random: Random) -> Wording:
        key = random.randrange(10 ** (digits - 1), 10**digits)
        start = random.randrange(len(text))
        turned = text[start:] + text[:start]
        answer = list(encode(f" {key}"))
        return Wording(lambda count: list(islice(cycle(turned), count)), before, answer, after, question)

    return drawn


def id_wording(vocab_size: int, digits: int = 5) -> Callable[[Random], Wording]:
    """The same without a language: the last id asks, the ten before it are digits, the others filler.

    Raises ValueError for a vocabulary below 12.
    """
    if vocab_size < 12:
        raise ValueError(f"vocab_size is {vocab_size}; 10 digits, a marker and a filler need at least 12")
    filler, marker = vocab_size - 11, vocab_size - 1

    def drawn(random: Random) -> Wording:
        answer = [filler + random.randrange(10) for _ in range(digits)]
        return Wording(
            lambda count: [random.randrange(filler) for _ in range(count)], [marker], answer, [], [marker]
        )

    return drawn


def make_passkeys(
    wording: Callable[[Random], Wording],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    trials: int = 1,
    seed: int = 0,
) -> tuple[Passkey, ...]:
    """`trials` prompts of each length (in tokens, question and answer included) and depth.

    A prompt depends on the seed and on its own length, depth and number, not on what else is asked for.

    Raises
    ------
    ValueError
        For a length that the key and the question do not fit in, and a depth outside 0 to 1.
    """
    return tuple(
        _hidden(wording(Random(f"{seed} {length} {float(depth)} {trial}")), length, depth)
        for length in lengths
        for depth in depths
        for trial in range(trials)
    )


def _hidden(words: Wording, length: int, depth: float) -> Passkey:
    needle = words.before + words.answer + words.after
    end = words.question + words.answer
    room = length - len(needle) - len(end)
    if room < 0:
        raise ValueError(
            f"a prompt of {length} tokens has no room for the key and the question; give at least "
            f"{length - room}"
        )
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; 0 (the beginning) to 1 (before the question) is meant")
    text = words.filler(room)
    place = round(depth * room)
    ids = [*text[:place], *needle, *text[place:], *end]
    return Passkey(torch.tensor(ids), len(words.answer), depth)


def score_passkeys(
    model: nn.Module, prompts: Sequence[Passkey], *, batch_size: int = 8
) -> tuple[PasskeyCell, ...]:
    """Exact matches of greedy decoding, by length and depth in ascending order.

    The answer is decoded right if each of its tokens is the likeliest after the prompt and the tokens before
    it, so that one pass over prompt and answer decides it.
    """
    right: dict[tuple[int, float], list[bool]] = {}
    with evaluating(model):
        forward, device = Forward(model), device_of(model)
        for batch in _alike(prompts, batch_size):
            ids = torch.stack([prompt.ids for prompt in batch])
            said = forward(ids.to(device)[:, :-1]).argmax(-1).cpu()
            for prompt, row in zip(batch, said, strict=True):
                match = torch.equal(row[-prompt.answer :], prompt.ids[-prompt.answer :])
                right.setdefault((len(prompt.ids), prompt.depth), []).append(match)
    return tuple(PasskeyCell(*cell, sum(found), len(found)) for cell, found in sorted(right.items()))


def _alike(prompts: Sequence[Passkey], batch_size: int) -> Iterator[list[Passkey]]:
    for _, group in groupby(sorted(prompts, key=_length), key=_length):
        while batch := list(islice(group, batch_size)):
            yield batch


def _length(prompt: Passkey) -> int:
    return len(prompt.ids)
