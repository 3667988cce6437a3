"""What a model's loss means, and what a token costs."""

from __future__ import annotations

from aiether.evaluation.flops import flops_per_token, measure_flops_per_token
from aiether.evaluation.mfu import mfu
from aiether.evaluation.quality import bits_per_byte, perplexity

__all__ = ["bits_per_byte", "flops_per_token", "measure_flops_per_token", "mfu", "perplexity"]
