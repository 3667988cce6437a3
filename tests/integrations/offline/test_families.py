"""Every row of the family table, grown on the disk: the function is kept, and a Trainer's optimizer fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families import FAMILY_NAMES, FAMILY_TABLE, FamilyCase, every_second_layer_a_mixture
from transformers import AutoModelForCausalLM

from aiether.growth import GrowthConfig
from aiether.integrations.offline import grow_checkpoint
from aiether.integrations.offline._trainer import meta_model, trainer_groups


@pytest.mark.parametrize("case", FAMILY_TABLE, ids=FAMILY_NAMES)
def test_zero_keeps_the_function(case: FamilyCase, tmp_path: Path) -> None:
    model = case.build(depth=2)
    model.save_pretrained(tmp_path / "model")
    growth = GrowthConfig(init="zero", placement="stack")
    grow_checkpoint(tmp_path / "model", tmp_path / "grown", to_layers=4, growth=growth)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    assert grown.config.num_hidden_layers == 4
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before, after = (each(ids, use_cache=False).logits for each in (model, grown))
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("case", FAMILY_TABLE, ids=FAMILY_NAMES)
def test_the_model_without_memory_has_the_same_parameters_in_the_same_order(case: FamilyCase) -> None:
    model = case.build(depth=2)
    names = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    meta = meta_model({**model.config.to_dict(), "architectures": [type(model).__name__]})
    assert [(name, parameter.shape) for name, parameter in meta.named_parameters()] == names
    assert sorted(name for group in trainer_groups(meta) for name in group) == sorted(n for n, _ in names)


def test_a_layer_whose_form_hangs_on_its_index_is_not_moved(tmp_path: Path) -> None:
    every_second_layer_a_mixture().save_pretrained(tmp_path / "model")
    growth = GrowthConfig(init="copy", placement="front")
    with pytest.raises(ValueError, match="ties the two to their index; choose another placement"):
        grow_checkpoint(tmp_path / "model", tmp_path / "grown", to_layers=3, growth=growth)
    assert not (tmp_path / "grown").exists()
