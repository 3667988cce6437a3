"""Means over seeds that may lack a value, and what was saved."""

from __future__ import annotations

import pytest
from scipy import stats

from aiether.study.statistics import mean_interval, savings_verdict, t_interval


def test_missing_values_are_left_out_and_counted() -> None:
    known = [0.24, 0.22, 0.29]
    result = mean_interval([0.24, None, 0.22, 0.29, None])
    assert (result.n, result.missing) == (3, 2)
    assert result.mean == pytest.approx(0.25)
    assert result.ci95 == pytest.approx(stats.t.interval(0.95, 2, 0.25, stats.sem(known)))
    assert t_interval(known, 0.99) == pytest.approx(stats.t.interval(0.99, 2, 0.25, stats.sem(known)))


def test_too_few_known_values_give_no_interval() -> None:
    assert mean_interval([None, None]).mean is None
    one = mean_interval([None, 0.2])
    assert (one.n, one.mean, one.sd, one.ci95) == (1, 0.2, None, None)
    with pytest.raises(ValueError, match="NaN"):
        mean_interval([float("nan"), None])


@pytest.mark.parametrize(
    ("savings", "words"),
    [
        ([0.24, 0.26, 0.22], "24 ± 5 % fewer FLOPs over 3 seeds"),
        ([0.24, None, 0.26, 0.22], "24 ± 5 % fewer FLOPs over 3 seeds; 1 seed outside the baseline's curve"),
        ([-0.24, -0.26, -0.22], "24 ± 5 % more FLOPs over 3 seeds"),
        (
            [0.24, -0.20, 0.1, None, None],
            "no saving shown: 5 ± 56 % over 3 seeds; 2 seeds outside the baseline's curve",
        ),
        ([0.24], "24% fewer FLOPs in one seed: no interval"),
        ([None], "no saving known; 1 seed outside the baseline's curve"),
        ([], "no saving known"),
    ],
)
def test_the_words_of_a_saving(savings: list[float | None], words: str) -> None:
    assert savings_verdict(savings, "FLOPs") == words
