"""One arm over seeds and tasks: IQM, its stratified bootstrap, probability of improvement."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from aiether.study.statistics import bootstrap_iqm, iqm, probability_of_improvement, summarise


def test_a_summary_is_what_numpy_and_scipy_say() -> None:
    values = [3.1, 3.4, 2.9, 3.0, 3.3, 3.2, 4.8, 3.15]
    summary = summarise(values)
    assert (summary.n, summary.median) == (8, np.median(values))
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.sd == pytest.approx(np.std(values, ddof=1))
    assert summary.ci95 == pytest.approx(stats.t.interval(0.95, 7, np.mean(values), stats.sem(values)))
    assert summary.iqm == pytest.approx(np.mean(sorted(values)[2:6]))


def test_the_bootstrap_agrees_with_scipy_s_where_there_is_one_task() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 12)
    expected = stats.bootstrap(
        (values,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        method="percentile",
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    assert bootstrap_iqm({"": values}) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_few_seeds_give_what_they_can() -> None:
    nothing, one, two = summarise([]), summarise([2.0]), summarise([1.0, 2.0])
    assert (nothing.n, nothing.mean, nothing.iqm, nothing.iqm_ci95) == (0, None, None, None)
    assert (one.mean, one.sd, one.ci95, one.iqm, one.iqm_ci95) == (2.0, None, None, 2.0, None)
    assert (two.iqm, two.iqm_ci95) == (1.5, (1.0, 2.0))


def test_seeds_are_drawn_within_tasks_and_tasks_never() -> None:
    """Two tasks far apart, hardly any noise: drawn across tasks the interval would be as wide as the gap."""
    runs = {"easy": [1.00, 1.01, 0.99], "hard": [9.00, 9.01, 8.99, 9.02, 8.98]}
    low, high = bootstrap_iqm(runs)
    assert high - low < 0.05
    assert bootstrap_iqm({"a": [1.0] * 4, "b": [9.0] * 4}) == (5.0, 5.0)


def test_the_interval_is_that_of_its_seed_and_needs_no_order_of_tasks() -> None:
    runs = {"a": [1.0, 2.0, 4.0, 3.0], "b": [2.0, 5.0, 1.0]}
    assert bootstrap_iqm(runs, seed=1) == bootstrap_iqm(runs, seed=1)
    assert bootstrap_iqm(runs, seed=1, resamples=500) != bootstrap_iqm(runs, seed=2, resamples=500)
    assert iqm(runs) == iqm(dict(reversed(runs.items())))
    assert bootstrap_iqm(runs, level=0.5)[0] > bootstrap_iqm(runs, level=0.95)[0]


def test_probability_of_improvement_is_mann_and_whitney_s_over_tasks() -> None:
    rng = np.random.default_rng(4)
    arm = {"a": rng.normal(1.0, 1.0, 6), "b": rng.normal(2.0, 1.0, 9)}
    against = {"a": rng.normal(1.8, 1.0, 8), "b": rng.normal(2.5, 1.0, 5)}
    expected = np.mean(
        [
            stats.mannwhitneyu(against[task], arm[task]).statistic / (len(arm[task]) * len(against[task]))
            for task in arm
        ]
    )
    lower = probability_of_improvement(arm, against)
    higher = probability_of_improvement(arm, against, higher_is_better=True)
    assert lower.probability == pytest.approx(expected)
    assert higher.probability == pytest.approx(1.0 - expected)
    assert lower.ci95[0] < lower.probability < lower.ci95[1]


def test_probability_of_improvement_at_its_ends() -> None:
    apart = probability_of_improvement({"a": [1.0, 2.0]}, {"a": [3.0, 4.0]})
    tied = probability_of_improvement({"a": [1.0, 1.0]}, {"a": [1.0, 1.0]})
    assert (apart.probability, apart.ci95) == (1.0, (1.0, 1.0))
    assert (tied.probability, tied.ci95) == (0.5, (0.5, 0.5))


def test_missing_tasks_runs_and_numbers_are_refused() -> None:
    for runs, words in (
        ({}, "no tasks"),
        ({"a": []}, "'a' has no runs"),
        ({"a": [float("nan")]}, "task 'a'.*NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            bootstrap_iqm(runs)
    with pytest.raises(ValueError, match=r"tasks \['a'\] of one arm and \['b'\]"):
        probability_of_improvement({"a": [1.0]}, {"b": [1.0]})
