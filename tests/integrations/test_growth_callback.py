from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aiether import fit
from aiether.callbacks import ProceduralGrowthCallback

from .tiny import tiny_model, tiny_trainer

GROWTH: dict[str, Any] = {
    "trigger": "fixed",
    "growth_fractions": (0.5,),
    "placement": "stack",
    "grow_by": "double",
    "protocol": "none",
    "collect_interval_steps": 1,
}


def callback(**settings: Any) -> ProceduralGrowthCallback:
    return ProceduralGrowthCallback(warmup_steps=0, growth_params={**GROWTH, **settings})


def test_under_fit_it_works_whole(tmp_path: Path) -> None:
    result = fit(tiny_trainer(tmp_path, callbacks=[callback()]))
    assert (result.status, result.depth, result.num_growths) == ("finished", 4, 1)


def test_in_a_bare_train_it_stops_with_a_grown_checkpoint_from_which_fit_goes_on(tmp_path: Path) -> None:
    bare = callback()
    trainer = tiny_trainer(tmp_path, callbacks=[bare], save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 12
    assert bare.grown_checkpoint is not None
    grown = AutoModelForCausalLM.from_pretrained(bare.grown_checkpoint)
    assert grown.config.n_layer == 4
    old = trainer.model.state_dict()  # type: ignore[union-attr]
    for name, tensor in old.items():
        assert torch.equal(grown.state_dict()[name], tensor)
    result = fit(tiny_trainer(tmp_path, callbacks=[callback()]), resume=True)
    assert (result.status, result.step, result.depth, result.num_growths) == ("finished", 24, 4, 1)


def test_a_bare_train_without_a_decision_is_an_ordinary_training(tmp_path: Path) -> None:
    idle, plain = callback(trigger="never"), tiny_model()
    trainer = tiny_trainer(tmp_path / "idle", callbacks=[idle])
    trainer.train()
    tiny_trainer(tmp_path / "plain", plain).train()
    assert idle.grown_checkpoint is None
    for name, tensor in trainer.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(plain.state_dict()[name], tensor)


def test_the_documented_call_takes_its_defaults_from_the_report() -> None:
    made = ProceduralGrowthCallback(
        patience=5,
        threshold=0.15,
        strategy="GeometricExtrapolator",
        warmup_steps=400,
        growth_params={"beta0": 0.1, "gamma0": 0.15, "eta0": 0.03, "k_subspace": 10, "ell_orth": 5},
    )
    assert made.growth.placement == "front"
    assert made.growth.protocol == "report"
    assert (made.growth.pg_patience, made.growth.pg_threshold, made.growth.init) == (5, 0.15, "geometric")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"growth_params": {"beta": 1.0}}, "no 'beta'"),
        ({"strategy": "magic"}, "init is 'magic'"),
        ({"patience": 0}, "pg_patience"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ProceduralGrowthCallback(**arguments)
