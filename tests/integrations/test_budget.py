"""A run whose number of steps changes while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from aiether.growth import GrowthConfig
from aiether.integrations import FitResult, Replan, Spent, StepBudget, fit

from .test_fit import Watch, assert_same, growth, weights
from .tiny import tiny_model, tiny_trainer

ONCE = growth(growth_fractions=(0.6,))


@dataclass
class At(StepBudget):
    """From one evaluation on the run has another number of steps."""

    step: int
    steps: int
    after_growth: int | None = None

    def correct(self, spent: Spent) -> Replan | None:
        return Replan(self.steps, "asked for") if spent.step == self.step else None

    def plan(self, spent: Spent) -> Replan:
        return Replan(self.after_growth or spent.total_steps, "grown")


def run(
    folder: Path, config: GrowthConfig, budget: StepBudget | None, watch: Watch | None = None, **settings: Any
) -> FitResult:
    resume = settings.pop("resume", False)
    plain = {"lr_scheduler_type": "constant", "logging_steps": 1}
    trainer = tiny_trainer(folder, tiny_model(), **(plain | settings))
    return fit(trainer, config, resume=resume, observers=[watch or Watch()], budget=budget)


def test_from_then_on_it_is_the_run_of_that_length(tmp_path: Path) -> None:
    steps = 28
    expected, watched = Watch(), Watch()
    whole = run(tmp_path / "whole", ONCE, None, expected, max_steps=steps)
    anew = run(tmp_path / "anew", ONCE, At(8, steps), watched, max_steps=20)
    (replan,) = [event for event in watched.events if event["event"] == "replan"]
    assert replan == {"event": "replan", "step": 8, "total_steps": steps, "reason": "asked for", "stage": 1}
    grown = [[e["step"] for e in w.events if e["event"] == "growth"] for w in (expected, watched)]
    assert grown[0] == grown[1] == [int(0.6 * steps)]
    assert whole.step == anew.step == steps
    assert [row["loss"] for row in watched.rows] == [row["loss"] for row in expected.rows]
    assert_same(weights(whole), weights(anew))


def test_resumed_it_has_the_steps_that_it_had(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 24, "lr_scheduler_type": "cosine", "save_steps": 3}
    expected, watched = Watch(), Watch()
    whole = run(tmp_path / "whole", ONCE, At(8, 20, 18), expected, **settings)
    for crash_at in (7, 15):  # before the correction, and after it and the growth
        with pytest.raises(RuntimeError, match="crash"):
            run(tmp_path / "cut", ONCE, At(8, 20, 18), Watch(crash_at), resume=True, **settings)
    again = run(tmp_path / "cut", ONCE, At(8, 20, 18), watched, resume=True, **settings)
    assert whole.step == again.step == 18
    rates = [[row["learning_rate"] for row in each.rows][-4:] for each in (expected, watched)]
    assert rates[0] == rates[1]
    assert_same(weights(whole), weights(again))


def test_a_growth_that_leaves_no_step_is_not_carried_out(tmp_path: Path) -> None:
    watched = Watch()
    result = run(tmp_path, ONCE, At(0, 0, after_growth=14), watched, max_steps=24)
    assert (result.step, result.depth) == (24, tiny_model().config.num_hidden_layers)
    warnings = [event["text"] for event in watched.events if event["event"] == "warning"]
    assert warnings[0].startswith("step 14: too late: the budget leaves no step to train")


def test_a_scheduler_that_cannot_follow_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = tiny_trainer(tmp_path, model, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        fit(trainer, ONCE, budget=StepBudget())
