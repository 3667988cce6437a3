"""What a model's loss means, what a token costs, and whether a causal model keeps its promises."""

from __future__ import annotations

from aiether.evaluation.compare import Comparison, compare
from aiether.evaluation.conformance import Check, ConformanceReport, check_conformance
from aiether.evaluation.flops import count_forward_flops, flops_per_token, measure_flops_per_token
from aiether.evaluation.loss import Bucket, LossSums, sum_losses, text_windows
from aiether.evaluation.memory import watch_peak
from aiether.evaluation.mfu import mfu
from aiether.evaluation.parity import Parity, decode_parity
from aiether.evaluation.quality import bits_per_byte, perplexity
from aiether.evaluation.windows import Window, cut_windows

__all__ = [
    "Bucket",
    "Check",
    "Comparison",
    "ConformanceReport",
    "LossSums",
    "Parity",
    "Window",
    "bits_per_byte",
    "check_conformance",
    "compare",
    "count_forward_flops",
    "cut_windows",
    "decode_parity",
    "flops_per_token",
    "measure_flops_per_token",
    "mfu",
    "perplexity",
    "sum_losses",
    "text_windows",
    "watch_peak",
]
