"""The arithmetic of the reference's toroidal results, for redoing its rows like for like. Not a perplexity.

Each line of a text stands alone, cut or padded with the end-of-text token to a fixed length; padding is
predicted and counted; lines weigh the same, however short; and in some rows labels were shifted before a
model that shifts them itself, so that the token after the next is asked for. Use `sum_losses` for all else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiether.evaluation._forward import Forward, device_of, evaluating

LINE_TOKENS = 256


@dataclass(frozen=True)
class LegacyLoss:
    """What the reference called a validation loss.

    Attributes
    ----------
    legacy_loss: mean over lines of the mean over their places, padding included, in nats.
    lines: how many; each of `line_tokens`.
    padding_share: how much of what was predicted is padding.
    double_shift: whether the token after the next was asked for.
    """

    legacy_loss: float
    lines: int
    line_tokens: int
    padding_share: float
    double_shift: bool

    @property
    def arithmetic(self) -> str:
        """What the number is, in one line."""
        twice = "labels shifted twice (t+2 is predicted), " if self.double_shift else ""
        return (
            f"legacy arithmetic: padding counted, lines cut or padded to {self.line_tokens} tokens, {twice}"
            "unweighted mean over lines; not a perplexity"
        )


def legacy_lines(text: str, *, empty: bool = False) -> list[str]:
    """The lines of a text as the reference's data set has them: with their line break, blank ones as "".

    `empty`: keep blank ones, which are then nothing but padding.
    """
    lines = (line + "\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n"))
    return [line for line in lines if line or empty]


def legacy_loss(
    model: nn.Module,
    lines: Iterable[Sequence[int]],
    *,
    pad_id: int,
    line_tokens: int = LINE_TOKENS,
    double_shift: bool = False,
    batch_size: int = 8,
) -> LegacyLoss:
    """The reference's loss of a model over lines, each a sequence of ids, empty ones included.

    Parameters
    ----------
    model: as for `check_conformance`; padding is hidden by an `attention_mask` where it takes one. A line of
        padding alone hides nothing: attention over nothing is not the same everywhere.
    pad_id: what a line is filled up with, and what is then predicted: the end-of-text token.
    double_shift: the last token is no input, and place i is to predict the token at i + 2.

    Raises
    ------
    ValueError
        For no line, and for a length that leaves nothing to predict.
    """
    if line_tokens < 2 + double_shift:
        raise ValueError(
            f"line_tokens is {line_tokens}; at least {2 + double_shift} are needed to predict one"
        )
    forward, device = Forward(model), device_of(model)
    means, remaining = list[Tensor](), iter(lines)
    padding = predicted = 0
    with evaluating(model):
        while batch := list(islice(remaining, batch_size)):
            ids, filled = _filled(batch, pad_id, line_tokens)
            means.append(_line_means(forward, ids.to(device), filled.to(device), double_shift))
            places = filled[:, 1 + double_shift :]
            padding, predicted = padding + int((~places).sum()), predicted + places.numel()
    if not means:
        raise ValueError("there is no line to evaluate; give a text that has some")
    by_line = torch.cat(means)
    return LegacyLoss(float(by_line.mean()), len(by_line), line_tokens, padding / predicted, double_shift)


def _filled(lines: Sequence[Sequence[int]], pad_id: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids, int64 (B, length), and which of them are the line's own, bool."""
    cut = [list(line[:length]) for line in lines]
    ids = torch.tensor([line + [pad_id] * (length - len(line)) for line in cut])
    return ids, torch.arange(length) < torch.tensor([len(line) for line in cut])[:, None]


def _line_means(forward: Forward, ids_BT: Tensor, filled_BT: Tensor, double_shift: bool) -> Tensor:
    """The mean loss of each line: float64 (B,), on the CPU."""
    stop = ids_BT.shape[1] - double_shift
    seen = filled_BT | ~filled_BT.any(1, keepdim=True)
    logits = forward(ids_BT[:, :stop], attention_mask=seen[:, :stop].long())[:, :-1]
    labels = ids_BT[:, 1 + double_shift :]
    rows = [
        F.cross_entropy(row.float(), wanted, reduction="none").cpu().double().mean()
        for row, wanted in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows)
