"""Named settings of growth: overrides on `GrowthConfig`'s defaults."""

from __future__ import annotations

from typing import Any

GROWTH_PRESETS: dict[str, dict[str, Any]] = {
    # The reference as documented: the class defaults.
    "report": {},
    # What measured well at both lengths of run that were tried (docs/recipe.md): whole-stack copies,
    # doubling, at 20 and 50 % of the budget, nothing frozen, old moments kept. With `--trigger geometric`
    # thresholds that do not depend on the window.
    "recommended": {
        "trigger": "fixed",
        "growth_fractions": (0.2, 0.5),
        "thresholds": "normalised",
        "tau_crit": 0.35,
        "kappa_crit": 0.45,
        "watch": "all",
        "placement": "stack",
        "grow_by": "double",
        "init": "copy",
        "scale": "displacement",
        "protocol": "none",
        "pg_patience": 2,
        "pg_threshold": 0.05,
        "warmup_steps": 100,
        "collect_interval_steps": 20,
    },
    # README, example 2: noisy gradients.
    "conservative": {
        "beta0": 0.08,
        "gamma0": 0.12,
        "eta0": 0.02,
        "k_subspace": 8,
        "ell_orth": 4,
        "tau_crit": 2.5,
        "kappa_crit": 0.7,
        "pg_patience": 5,
    },
    # README, example 3: smooth landscapes, large batches.
    "aggressive": {
        "beta0": 0.15,
        "gamma0": 0.20,
        "eta0": 0.05,
        "k_subspace": 12,
        "ell_orth": 6,
        "tau_crit": 1.8,
        "kappa_crit": 0.4,
        "pg_patience": 3,
    },
    # README, tuning guidelines below 100 M parameters: the defaults with beta0 from 0.12 to 0.15.
    "small": {"beta0": 0.13},
    # README, tuning guidelines above 1 B parameters: beta0 and gamma0 lower by 30 to 50 %, k 15 to 20,
    # tau_crit 2.5 to 3.0.
    "large": {"beta0": 0.06, "gamma0": 0.09, "k_subspace": 15, "tau_crit": 2.75},
}
"""Overrides by preset name; `GrowthConfig(**GROWTH_PRESETS[name])` is the whole configuration."""
