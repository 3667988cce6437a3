from __future__ import annotations

from typing import Any

import pytest

from aiether.geometry import Extrapolator
from aiether.growth import GROWTH_PRESETS, GrowthConfig

DOCUMENTED = {  # the three tables of the reference's README
    "beta0": 0.1,
    "gamma0": 0.15,
    "eta0": 0.03,
    "k_subspace": 10,
    "ell_orth": 5,
    "pg_patience": 5,
    "pg_threshold": 0.15,
    "tau_crit": 2.0,
    "kappa_crit": 0.5,
    "warmup_steps": 400,
    "history_window_size": 15,
    "collect_interval_steps": 100,
}


def test_defaults_are_the_documented_ones() -> None:
    config = GrowthConfig()
    assert {name: getattr(config, name) for name in DOCUMENTED} == DOCUMENTED
    assert config == GrowthConfig(**GROWTH_PRESETS["report"])
    assert config.out_of_range() == []


@pytest.mark.parametrize("name", sorted(GROWTH_PRESETS))
def test_presets_are_valid_and_within_the_documented_ranges(name: str) -> None:
    config = GrowthConfig(**GROWTH_PRESETS[name])
    config.validate()
    assert config.out_of_range() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": "sometimes"}, "geometric, plateau, lag, fixed, random, never"),
        ({"placement": "middle"}, "stack, interleave, top, front"),
        ({"init": "net2net"}, "geometric, copy, zero, random, noise"),
        ({"moments": "keep"}, "zero, copy, reset"),
        ({"grow_by": 0}, "'double' or 'max'"),
        ({"grow_by": "triple"}, "'double' or 'max'"),
        ({"grow_by": True}, "'double' or 'max'"),
        ({"k_subspace": 0}, "'auto'"),
        ({"pg_patience": 0}, "greater than 0"),
        ({"pg_threshold": float("nan")}, "greater than 0"),
        ({"collect_interval_steps": 0}, "greater than 0"),
        ({"noise": -0.1}, "0 or greater"),
        ({"beta0": float("inf")}, "0 or greater"),
        ({"warmup_steps": -1}, "0 or greater"),
        ({"history_window_size": 2}, "at least 3"),
        ({"latest_growth": 0.0}, "fraction of the budget"),
        ({"latest_growth": 1.5}, "fraction of the budget"),
        ({"growth_fractions": (0.5, 0.2)}, "rising fractions"),
        ({"growth_fractions": (0.2, 1.0)}, "rising fractions"),
        ({"trigger": "fixed", "growth_fractions": ()}, "at least one"),
        ({"trigger": "fixed", "growth_fractions": (0.9,)}, "raise latest_growth"),
        ({"grow_to": (6, 4)}, "rising depths"),
        ({"max_layers": 0}, "1 or more"),
        ({"max_layers": 4, "grow_to": (6,)}, "raise max_layers"),
    ],
)
def test_what_cannot_work_is_refused_with_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    config = GrowthConfig(**settings)
    with pytest.raises(ValueError, match=message):
        config.validate()


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"beta0": 0.6}, ["beta0"]),
        ({"gamma0": 0.0, "eta0": 0.0}, ["gamma0", "eta0"]),
        ({"k_subspace": 3, "ell_orth": 12}, ["k_subspace", "ell_orth"]),
        ({"k_subspace": "auto"}, []),
        ({"tau_crit": 4.0, "kappa_crit": 0.1}, ["tau_crit", "kappa_crit"]),
        ({"tau_crit": 0.5, "thresholds": "normalised"}, []),
        ({"beta0": 1.0, "scale": "displacement"}, ["beta0"]),
        ({"pg_patience": 20, "history_window_size": 30}, ["pg_patience", "history_window_size"]),
        ({"isolated_warmup_steps": 100}, ["isolated_warmup_steps"]),
        ({"isolated_warmup_steps": 100, "protocol": "none"}, []),
    ],
)
def test_values_outside_the_documented_ranges_warn(settings: dict[str, Any], warned: list[str]) -> None:
    warnings = GrowthConfig(**settings).out_of_range()
    assert sorted(text.split()[0] for text in warnings) == sorted(warned)
    GrowthConfig(**settings).validate()


def test_the_extrapolator_takes_every_setting_of_its_own() -> None:
    shared = {"beta0": 0.2, "gamma0": 0.1, "eta0": 0.05, "k_subspace": 6, "ell_orth": 4, "tau_crit": 1.7}
    shared |= {"kappa_crit": 0.4, "thresholds": "normalised", "scale": "displacement", "center": True}
    shared |= {"escape": "residual"}
    assert GrowthConfig(**shared).extrapolator() == Extrapolator(**shared)
