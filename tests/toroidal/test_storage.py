"""Retrofitted models on disk: differences and whole folders, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.families import FAMILY_TABLE
from transformers import AutoModelForCausalLM

import aiether
from aiether.toroidal import set_progress, torus_terms

IDS = torch.arange(1, 25)[None]
LLAMA = next(case for case in FAMILY_TABLE if case.name == "llama")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    LLAMA.build(depth=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def retrofitted(base: Path) -> Any:
    """At progress 0.5, with learned terms and one changed weight of the base."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    aiether.retrofit(model, layers=[1], platters=2, period=16)
    set_progress(model, 0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        for terms in torus_terms(model):
            for parameter in terms.parameters():
                parameter.normal_()
        model.model.layers[1].self_attn.q_proj.weight.add_(0.1)
    return model.eval()


def equal(one: Any, other: Any) -> bool:
    states = one.state_dict(), other.state_dict()
    same = states[0].keys() == states[1].keys()
    with torch.no_grad():
        logits = [model.eval()(IDS).logits for model in (one, other)]
    return same and all(torch.equal(states[0][n], states[1][n]) for n in states[0]) and torch.equal(*logits)


def test_differences_are_all_that_is_stored_and_come_back_bit_by_bit(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "torus")
    assert {path.name for path in (tmp_path / "torus").iterdir()} == {"toroidal.json", "toroidal.safetensors"}
    with safe_open(tmp_path / "torus" / "toroidal.safetensors", "pt") as file:
        others = {name for name in file.keys() if ".torus." not in name}  # noqa: SIM118 - not a dict
    assert others == {"model.layers.1.self_attn.q_proj.weight"}
    loaded = aiether.load(tmp_path / "torus")
    assert equal(model, loaded)
    loaded.save_pretrained(tmp_path / "again")  # the base is still known
    assert equal(model, aiether.load(tmp_path / "again"))


def test_whole_folders_come_back_bit_by_bit(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert equal(model, aiether.load(tmp_path / "whole"))
    assert equal(model, AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))


def test_a_folder_holds_one_or_the_other(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "torus")
    set_progress(model, 1.0)
    model.save_pretrained(tmp_path / "torus", whole=True)
    assert equal(model, aiether.load(tmp_path / "torus"))
    with pytest.raises(ValueError, match="holds a whole model"):
        model.save_pretrained(tmp_path / "torus")


def test_a_base_is_found_from_another_place_and_missed_by_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = retrofitted(Path("base"))
    model.save_pretrained("torus")
    monkeypatch.chdir(base)
    assert equal(model, aiether.load(tmp_path / "torus"))
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="not there any more"):
        aiether.load(tmp_path / "torus")


def test_a_model_without_a_base_is_stored_whole(tmp_path: Path) -> None:
    model = aiether.retrofit(LLAMA.build(depth=2), layers=[0])
    set_progress(model, 1.0)
    model.save_pretrained(tmp_path)
    assert equal(model, aiether.load(tmp_path))


def test_half_precision_comes_back_with_terms_in_single(base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    aiether.retrofit(model, layers=[0, 1])
    set_progress(model, 0.5)
    model.save_pretrained(tmp_path / "torus")
    loaded: Any = aiether.load(tmp_path / "torus")
    assert loaded.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for terms in torus_terms(loaded) for p in terms.parameters())
    assert equal(model, loaded)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    retrofitted(base).save_pretrained(tmp_path / "torus")
    LLAMA.build(depth=2, seed=1).save_pretrained(base)
    with pytest.raises(ValueError, match="another fingerprint"):
        aiether.load(tmp_path / "torus")


def test_folders_that_hold_something_else_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without toroidal layers"):
        aiether.load(base)
    with pytest.raises(ValueError, match="holds no model"):
        aiether.load(tmp_path / "nowhere")
