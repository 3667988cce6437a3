"""Every family of the table: found, grown in every way, silenced, generated from, saved, trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from tests.families import FAMILY_NAMES, FAMILY_TABLE, VOCAB, FamilyCase
from torch import Tensor
from transformers import PreTrainedModel

from aiether.geometry import Trajectory
from aiether.growth import (
    Family,
    GrowthConfig,
    GrowthPlan,
    TrainingState,
    block_tensors,
    family_of,
    migrate,
)
from aiether.growth.config import Initialiser, Placement
from aiether.integrations._model import blocks_of, build_model, check_plan_fits

every_family = pytest.mark.parametrize("case", FAMILY_TABLE, ids=FAMILY_NAMES)
TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
DEPTH = 2


def backward(model: PreTrainedModel, seed: int) -> None:
    tokens = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


@cache
def trained(case: FamilyCase) -> tuple[PreTrainedModel, Trajectory, Family]:
    """A model after a few real steps, and the history of its blocks."""
    model, trajectory = case.build(DEPTH), Trajectory(8)
    family = family_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append({n: p for n, p in model.named_parameters() if family.split(n)}, step)
    return model, trajectory, family


def grow(case: FamilyCase, placement: Placement, init: Initialiser, to_layers: int = 4) -> PreTrainedModel:
    model, trajectory, _ = trained(case)
    plan = getattr(GrowthPlan, placement)(model, to_layers, init)
    state = TrainingState(config=model.config.to_dict(), tensors=model.state_dict())
    migration = migrate(state, plan, growth=GrowthConfig(), trajectory=trajectory, final_depth=4, seed=0)
    return build_model(model, migration.state).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def relative_gap(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


@every_family
def test_the_blocks_are_found_and_what_silences_them(case: FamilyCase) -> None:
    model = case.build(3)
    family = family_of(model)
    assert family == family_of(model.config) == family_of(model.config.to_dict())
    assert family.blocks == family_of(case.model_type).blocks
    blocks = block_tensors(model.state_dict(), family)
    assert list(blocks) == [0, 1, 2]
    assert family.depth(model.config.to_dict()) == 3
    assert len(blocks_of(model, family)) == 3
    values = {suffix: family.identity_value(suffix) for suffix in blocks[0]}
    assert {s: v for s, v in values.items() if v is not None} == dict.fromkeys(case.zeroed, case.value)
    parameters = dict(model.named_parameters())
    outputs = {s for s, n in blocks[0].items() if family.is_output_projection(s) and parameters[n].ndim > 1}
    assert outputs == set(case.projections)


@every_family
@pytest.mark.parametrize("placement", get_args(Placement))
def test_every_initialiser_gives_a_whole_model(case: FamilyCase, placement: Placement) -> None:
    model, _, family = trained(case)
    check_plan_fits(model, getattr(GrowthPlan, placement)(model, 4), family)
    for init in get_args(Initialiser):
        grown = grow(case, placement, init)
        assert family.depth(grown.config.to_dict()) == 4
        with torch.no_grad():
            output = grown(TOKENS, use_cache=False, output_hidden_states=True)
        assert len(output.hidden_states) == 5  # no layer is left out of the forward pass
        assert torch.isfinite(output.logits).all()
        if init == "zero":
            assert relative_gap(output.logits, logits(model)) <= 1e-5
        else:
            assert relative_gap(output.logits, logits(model)) > 1e-5


@every_family
def test_lists_of_the_configuration_move_with_their_layers(case: FamilyCase) -> None:
    before, after = trained(case)[0].config.to_dict(), grow(case, "interleave", "copy").config.to_dict()
    lists = {k: v for k, v in before.items() if k in ("layer_types", "no_rope_layers") and v}
    assert bool(lists) == (case.model_type in ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"))
    for key, values in lists.items():
        assert after[key] == [values[0], values[0], values[1], values[1]]


@every_family
def test_generation_with_the_cache_agrees_with_the_one_without(case: FamilyCase) -> None:
    grown = grow(case, "front", "noise")  # every old layer gets another index
    generate: Any = grown.generate
    cached, plain = (
        generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


LOAD_ALONE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected = torch.load(sys.argv[1], weights_only=True)
gaps = {}
for folder, logits in expected["logits"].items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        own = model(expected["tokens"], use_cache=False).logits
    gaps[Path(folder).name] = float((own - logits).abs().max())
assert not any(name.partition(".")[0] == "aiether" for name in sys.modules)
print(json.dumps(gaps))
"""


def test_saved_models_give_the_same_logits_in_a_process_without_aiether(tmp_path: Path) -> None:
    expected = {}
    cases = [case for case in FAMILY_TABLE if case.model_type != "lahr"]  # the one model of aiether's own
    for case in cases:
        grown = grow(case, "interleave", "noise")
        grown.save_pretrained(tmp_path / case.name)
        expected[str(tmp_path / case.name)] = logits(grown)
    torch.save({"tokens": TOKENS, "logits": expected}, tmp_path / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_ALONE, str(tmp_path / "expected.pt")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    gaps = json.loads(output.splitlines()[-1])
    assert tuple(gaps) == tuple(case.name for case in cases)
    assert max(gaps.values()) < 1e-6


@every_family
def test_the_family_fits_the_names_in_a_saved_folder(case: FamilyCase, tmp_path: Path) -> None:
    model = case.build(3)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        family = family_of(json.loads((tmp_path / "config.json").read_text()), names=names)
        blocks = block_tensors(names, family)
        assert list(blocks) == [0, 1, 2]
        silenced = [suffix for suffix in blocks[1] if family.identity_value(suffix) is not None]
        assert {family.identity_value(suffix) for suffix in silenced} == {case.value}
        size = sum(file.get_tensor(blocks[1][suffix]).numel() for suffix in silenced)
    own = model.state_dict()
    assert size == sum(own[family.name(1, suffix)].numel() for suffix in case.zeroed)


@every_family
@pytest.mark.parametrize("init", ["copy", "zero"])
def test_every_new_tensor_moves_within_three_steps(case: FamilyCase, init: Initialiser) -> None:
    grown, family = grow(case, "top", init), trained(case)[2]
    new = {n: p for n, p in grown.named_parameters() if (family.split(n) or (0,))[0] >= DEPTH}
    before = {name: parameter.detach().clone() for name, parameter in new.items()}
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        backward(grown, 10 + step)
        still = {name for name, p in new.items() if p.grad is None or not p.grad.any()}
        if init == "zero" and step == 0:
            # A silenced branch passes no gradient inwards: only what silences it can move at first.
            moving = {
                name for name in new if family.identity_value((family.split(name) or ("", ""))[1]) is not None
            }
            assert still == new.keys() - moving
        else:
            assert not still
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, parameter in new.items() if torch.equal(parameter, before[name])]
