"""Nothing that comes later changes what a model says earlier."""

from __future__ import annotations

from collections.abc import Iterator

from aiether.evaluation.conformance._report import Check
from aiether.evaluation.conformance._trial import Trial, Worst

SEQUENCES = 3


def later_tokens(trial: Trial) -> Check:
    """Other tokens after position t leave the logits at and before t as they were."""
    worst = Worst()
    for number in range(SEQUENCES):
        ids = trial.ids(1, number)
        full = trial.forward(ids)[0]
        for t in _cuts(trial.length, number):
            changed = ids.clone()
            changed[:, t + 1 :] = trial.other_ids(ids[:, t + 1 :], number * 101 + t)
            found = trial.forward(changed)[0, : t + 1]
            told = f"sequence {number}, tokens after {t} changed, position"
            worst.see(full[: t + 1], found, lambda position, told=told: f"{told} {position}")
    return trial.relative_check("later tokens", worst)


def shorter_input(trial: Trial) -> Check:
    """The sequence cut after position t has the logits at and before t that it has at its full length."""
    worst = Worst()
    for number in range(SEQUENCES):
        ids = trial.ids(1, number)
        full = trial.forward(ids)[0]
        for t in _cuts(trial.length, number):
            found = trial.forward(ids[:, : t + 1])[0]
            told = f"sequence {number}, cut after {t}, position"
            worst.see(full[: t + 1], found, lambda position, told=told: f"{told} {position}")
    return trial.relative_check("shorter input", worst)


def _cuts(length: int, number: int) -> Iterator[int]:
    """All positions but the last in the first sequence, since a leak may be at one alone; some in others."""
    few = {0, 1, length // 4, length // 2, 3 * length // 4, length - 2}
    yield from range(length - 1) if number == 0 else sorted(few)
