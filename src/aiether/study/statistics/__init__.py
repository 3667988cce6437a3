"""What a study's numbers say: paired tests over seeds, correction, effect sizes, intervals and words.

Pure functions of numbers; see docs/statistics.md.
"""

from __future__ import annotations

from aiether.study.statistics.aggregate import (
    Improvement,
    Summary,
    bootstrap_iqm,
    iqm,
    probability_of_improvement,
    summarise,
)
from aiether.study.statistics.factorial import Effect, factorial
from aiether.study.statistics.interval import MeanInterval, mean_interval, t_interval
from aiether.study.statistics.paired import Paired, detectable_dz, paired
from aiether.study.statistics.planned import Comparison, compare_planned, holm
from aiether.study.statistics.savings import savings_verdict
from aiether.study.statistics.sign_flip import seeds_needed, sign_flip_p, smallest_p
from aiether.study.statistics.verdict import verdict

__all__ = [
    "Comparison",
    "Effect",
    "Improvement",
    "MeanInterval",
    "Paired",
    "Summary",
    "bootstrap_iqm",
    "compare_planned",
    "detectable_dz",
    "factorial",
    "holm",
    "iqm",
    "mean_interval",
    "paired",
    "probability_of_improvement",
    "savings_verdict",
    "seeds_needed",
    "sign_flip_p",
    "smallest_p",
    "summarise",
    "t_interval",
    "verdict",
]
