"""What every check works with: random sequences, the model's logits, and the largest difference found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of
from aiether.evaluation.conformance._report import Check

ROUNDING = 0.1
"""Logits above ten are held to `tolerance` times a tenth of their size, since float32 rounds them more."""


@dataclass(frozen=True)
class Trial:
    """One model under test.

    Attributes
    ----------
    model: in float32.
    vocab_size: ids are drawn below it.
    length: tokens of a sequence.
    seed: what they are drawn with.
    tolerance: how far two logits that should be equal may be apart.
    """

    model: nn.Module
    vocab_size: int
    length: int
    seed: int
    tolerance: float

    @cached_property
    def forward(self) -> Forward:
        """The model as a function."""
        return Forward(self.model)

    def ids(self, rows: int, number: int = 0) -> Tensor:
        """Random ids (rows, length), int64; the same for the same number."""
        drawn = torch.randint(self.vocab_size, (rows, self.length), generator=self._generator(number))
        return drawn.to(device_of(self.model))

    def other_ids(self, ids: Tensor, number: int) -> Tensor:
        """Random ids of the same shape, each another one than in `ids`."""
        steps = torch.randint(1, self.vocab_size, ids.shape, generator=self._generator(number))
        return (ids + steps.to(ids.device)) % self.vocab_size

    def check(self, name: str, worst: Worst, detail: str = "") -> Check:
        """The check whose comparisons `worst` has seen."""
        bound = self.tolerance * max(1.0, ROUNDING * worst.scale)
        return Check(name, worst.value <= bound, worst.value, bound, worst.where, detail)

    def relative_check(self, name: str, worst: Worst) -> Check:
        """As `check`, bound by the logits' size alone, however small."""
        bound = self.tolerance * ROUNDING * worst.scale
        return Check(name, worst.value <= bound, worst.value, bound, worst.where)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1009 + number)


@dataclass
class Worst:
    """The largest difference seen, where it was, and the size of the logits."""

    value: float = 0.0
    where: str = ""
    scale: float = 0.0

    def see(self, expected_TV: Tensor, found_TV: Tensor, where: Callable[[int], str]) -> None:
        """Compare logits; `where` names a position (the first index)."""
        expected, found = expected_TV.detach().float(), found_TV.detach().float()
        finite = expected[expected.isfinite()]
        if len(finite):
            self.scale = max(self.scale, float(finite.abs().max()))
        # Masked entries are -inf on both sides, whose difference would be NaN.
        apart = torch.where(expected == found, 0.0, (expected - found).abs())
        by_position = apart.flatten(1).amax(1)
        position = int(by_position.argmax())  # NaN counts as the largest
        value = float(by_position[position])
        if not math.isnan(self.value) and (math.isnan(value) or value > self.value):
            self.value, self.where = value, where(position)

    def see_rows(self, expected_BTV: Tensor, found_BTV: Tensor, label: str = "row") -> None:
        """Compare a batch of equal shape."""
        for row, (expected, found) in enumerate(zip(expected_BTV, found_BTV, strict=True)):
            self.see(expected, found, lambda position, row=row: f"{label} {row}, position {position}")


@dataclass(frozen=True)
class Padded:
    """A batch of unequal length, padded on the left, with what generate() passes beside it.

    Attributes
    ----------
    ids: (rows, width), random ids where there is padding.
    mask: (rows, width), 1 for tokens of the text.
    position_ids: (rows, width): each row counts from its first token; 0 at padding.
    starts: where each row begins.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    starts: Sequence[int]

    @classmethod
    def batch(cls, trial: Trial, most_padding: int) -> Padded:
        """Three rows: without padding, with the most, and with half of it."""
        starts = (0, most_padding, most_padding // 2)
        ids = trial.ids(len(starts), number=7)
        columns = torch.arange(trial.length, device=ids.device)
        mask = (columns >= torch.tensor(starts, device=ids.device)[:, None]).long()
        return cls(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), starts)

    def inputs(self, stop: int, start: int = 0) -> dict[str, Tensor]:
        """Mask and positions for the columns `start` to `stop`; the mask reaches back over the cache."""
        return {
            "attention_mask": self.mask[:, :stop],
            "position_ids": self.position_ids[:, start:stop],
        }

    def alone(self, forward: Forward) -> list[Tensor]:
        """Each row by itself, without padding: logits (1, its length, V)."""
        return [forward(self.ids[row : row + 1, start:]) for row, start in enumerate(self.starts)]
