"""A sequence is the same alone, beside others, and after padding."""

from __future__ import annotations

import torch

from aiether.evaluation.conformance._report import Check
from aiether.evaluation.conformance._trial import Padded, Trial, Worst

ROWS = 4


def row_in_a_batch(trial: Trial) -> Check:
    """Each row of a batch has the logits that it has alone."""
    worst = Worst()
    ids = trial.ids(ROWS)
    together = trial.forward(ids)
    alone = torch.cat([trial.forward(row[None]) for row in ids])
    worst.see_rows(alone, together)
    return trial.check("row in a batch", worst)


def left_padding(trial: Trial) -> Check:
    """Each row of a batch of unequal length, padded on the left, has the logits that it has alone."""
    name = "left padding"
    if not trial.forward.takes("attention_mask"):
        return Check.not_applicable(name, "forward takes no attention_mask")
    padded, worst = Padded.batch(trial, trial.length // 2), Worst()
    together = trial.forward(padded.ids, **padded.inputs(trial.length))
    for row, (start, alone) in enumerate(zip(padded.starts, padded.alone(trial.forward), strict=True)):
        told = f"row {row} after {start} of padding, position"
        worst.see(alone[0], together[row, start:], lambda position, told=told: f"{told} {position}")
    return trial.check(name, worst)
