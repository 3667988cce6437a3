from __future__ import annotations

from typing import Any

import pytest
import torch

from aiether.geometry import metrics_from_gram
from aiether.growth import GrowthConfig, TriggerState
from aiether.growth.replay import calibrate, every_firing, first_firing, stretches
from aiether.growth.trigger import Observation, decide

RUN: dict[str, Any] = {"total_steps": 1000, "final_depth": 8, "seed": 0}


def geometry(diffusion: float) -> dict[str, Any]:
    """A window of ten velocities: a common direction, and one of their own that grows with `diffusion`."""
    return metrics_from_gram(torch.ones(10, 10) + diffusion * torch.eye(10)).to_dict()


def record(num: int = 19, depth: int = 4) -> list[dict[str, Any]]:
    """Every 50 steps: a loss that flattens, a path that turns from travel into diffusion."""
    rows: list[dict[str, Any]] = []
    for index in range(1, num + 1):
        rows.append({"step": 50 * index - 25, "loss": 3.0, "depth": depth})
        rows.append(
            {"step": 50 * index, "eval_loss": 3.0 + 2.0 * 0.7**index, "depth": depth, **geometry(0.3 * index)}
        )
    return rows


def config(**settings: Any) -> GrowthConfig:
    plain: dict[str, Any] = {
        "thresholds": "normalised",
        "tau_crit": 0.2,
        "kappa_crit": 0.2,
        "pg_patience": 2,
        "pg_threshold": 0.05,
        "warmup_steps": 100,
        "protocol": "none",
        "growth_fractions": (0.5,),
        "max_layers": 8,
        "grow_by": "double",
    }
    return GrowthConfig(**{**plain, **settings})


def test_a_record_is_cut_where_the_depth_changes() -> None:
    parts = stretches([*record(3), *record(2, depth=8)])
    assert [(part.depth, part.steps) for part in parts] == [(4, (50, 100, 150)), (8, (50, 100))]


def test_rows_without_geometry_have_none() -> None:
    bare = [{"step": 1, "eval_loss": 2.0, "depth": 4, "tau": None}]
    assert stretches(bare)[0].metrics == (None,)


def test_the_answer_is_what_the_trigger_says_as_the_run_goes() -> None:
    (stretch,) = stretches(record())
    state = TriggerState.start(config(), depth=4, final_depth=8, total_steps=1000, seed=0)
    expected = None
    for step, loss, measured in zip(stretch.steps, stretch.eval_losses, stretch.metrics, strict=True):
        seen = Observation(
            step=step, total_steps=1000, depth=4, final_depth=8, eval_loss=loss, metrics=measured
        )
        state, decision = decide(config(), state, seen)
        if decision.grow and expected is None:
            expected = step
    firing = first_firing(config(), stretch, **RUN)
    assert expected is not None
    assert (firing.step, firing.trigger) == (expected, "geometric")


@pytest.mark.parametrize(
    ("trigger", "times"), [("fixed", "growth_fractions"), ("geometric", "deadline_fractions")]
)
def test_times_by_the_clock_count_from_the_start_of_the_run(trigger: Any, times: str) -> None:
    """After a growth the next of the run's own times is due, not the first again."""
    rows = [{**row, "depth": 2 if row["step"] <= 200 else 4} for row in record()]
    settings = config(**{"trigger": trigger, "tau_crit": 1e9, times: (0.2, 0.5)})
    small, grown = stretches(rows)
    assert (grown.first_depth, grown.growth_steps) == (2, (200,))
    assert first_firing(settings, small, **RUN).step == 200
    assert first_firing(settings, grown, **RUN).step == 500


def test_every_trigger_is_asked() -> None:
    (stretch,) = stretches(record())
    firings = every_firing(config(), stretch, **RUN)
    fired = {firing.trigger: firing.step for firing in firings}
    assert set(fired) == {"geometric", "plateau", "lag", "fixed", "random"}
    assert [firing.trigger for firing in firings if not firing.asked] == ["lag"]
    assert fired["fixed"] == 500
    assert fired["plateau"] is not None
    assert fired["geometric"] is not None
    assert fired["geometric"] >= fired["plateau"]


def test_one_that_would_not_have_fired_says_why() -> None:
    (stretch,) = stretches(record())
    firing = first_firing(config(tau_crit=50.0), stretch, **RUN)
    assert firing.step is None
    assert "threshold 50" in firing.reason


def test_later_quantiles_fire_later() -> None:
    (stretch,) = stretches(record())
    loose = config(pg_threshold=0.5)
    found = calibrate(loose, stretch, (0.3, 0.5, 0.7), **RUN)
    assert [entry.quantile for entry in found] == [0.3, 0.5, 0.7]
    steps = [entry.firing.step for entry in found]
    assert all(step is not None for step in steps)
    assert steps == sorted(set(steps))  # type: ignore[type-var]
    for entry in found:
        again = config(pg_threshold=0.5, tau_crit=entry.tau_crit, kappa_crit=entry.kappa_crit)
        assert first_firing(again, stretch, **RUN).step == entry.firing.step


def test_calibration_needs_geometry_and_quantiles() -> None:
    (stretch,) = stretches([{"step": 50, "eval_loss": 2.0, "depth": 4}])
    with pytest.raises(ValueError, match="dry_run"):
        calibrate(config(), stretch, (0.5,), **RUN)
    (stretch,) = stretches(record())
    with pytest.raises(ValueError, match=r"0 to 1, not \[1.5\]"):
        calibrate(config(), stretch, (1.5,), **RUN)
