"""Retrofitted models on disk: differences and whole folders, bit by bit."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from tests.families import FAMILY_TABLE
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification

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
    assert {path.name for path in (tmp_path / "torus").iterdir()} == {
        "generation_config.json",
        "toroidal.json",
        "toroidal.safetensors",
    }
    assert stored(tmp_path / "torus") == {"model.layers.1.self_attn.q_proj.weight"}
    loaded = aiether.load(tmp_path / "torus")
    assert equal(model, loaded)
    loaded.save_pretrained(tmp_path / "again")  # the base is still known
    assert equal(model, aiether.load(tmp_path / "again"))


def stored(folder: Path) -> set[str]:
    """Tensors of the base that a folder of differences holds anew."""
    with safe_open(folder / "toroidal.safetensors", "pt") as file:
        return {name for name in file.keys() if ".torus." not in name}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16])
def test_another_dtype_than_the_bases_is_no_difference(
    base: Path, tmp_path: Path, kept: torch.dtype, used: torch.dtype
) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=kept).save_pretrained(tmp_path / "kept")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=used)
    aiether.retrofit(model, layers=[1], platters=2, period=16)
    set_progress(model, 0.5)
    model.model.norm.float()  # one of another type, as training in mixed types leaves it
    attention = model.model.layers[1].self_attn
    attention.v_proj.float()
    with torch.no_grad():
        attention.q_proj.weight.add_(0.1)
        attention.v_proj.weight.add_(0.1)  # what half precision would round
    model.save_pretrained(tmp_path / "torus")
    assert stored(tmp_path / "torus") == {
        f"model.layers.1.self_attn.{name}_proj.weight" for name in ("q", "v")
    }
    loaded: Any = aiether.load(tmp_path / "torus")
    states = model.state_dict(), loaded.state_dict()
    assert {n: t.dtype for n, t in states[0].items()} == {n: t.dtype for n, t in states[1].items()}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    asked: Any = aiether.load(tmp_path / "torus", dtype=torch.float16)
    assert {p.dtype for n, p in asked.named_parameters() if ".torus." not in n} == {torch.float16}


def test_only_the_main_process_writes_and_generation_settings_come_back(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.generation_config.max_new_tokens = 7
    model.generation_config.temperature = 0.6  # without do_sample, as models on the Hub have it
    for whole in (False, True):
        model.save_pretrained(tmp_path / "torus", is_main_process=False, whole=whole)
    assert not list((tmp_path / "torus").glob("*.json*"))
    model.save_pretrained(tmp_path / "torus", True, safe_serialization=True, max_shard_size="50GB")
    assert aiether.load(tmp_path / "torus").generation_config == model.generation_config


@pytest.mark.parametrize(
    "given",
    [
        {"push_to_hub": True},
        {"repo_id": "mine"},
        {"max_shard_size": "1MB"},
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"colour": "red"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_differences_cannot_have_is_refused(base: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.*whole=True"):
        retrofitted(base).save_pretrained(tmp_path / "torus", **given)
    assert not (tmp_path / "torus").exists()


def test_a_state_of_ones_own_is_compared_too(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] += 1
    model.save_pretrained(tmp_path / "torus", state_dict=state, whole=False)
    assert stored(tmp_path / "torus") == {"model.layers.1.self_attn.q_proj.weight", "model.norm.weight"}
    assert torch.equal(aiether.load(tmp_path / "torus").model.norm.weight, state["model.norm.weight"])


def test_the_hub_gets_a_whole_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    class Api:
        """What transformers asks of the Hub."""

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list[Any], **kwargs: Any) -> set[str]:
            return {each.path_in_repo for each in operations}

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: ModelCard("---\n---\n"))
    files: Any = retrofitted(base).push_to_hub("mine/torus")
    assert files == {"config.json", "generation_config.json", "model.safetensors", "README.md"}


def test_whole_folders_come_back_bit_by_bit(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert equal(model, aiether.load(tmp_path / "whole"))
    assert equal(model, AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))


def test_what_was_loaded_as_a_whole_is_no_base_of_differences(base: Path, tmp_path: Path) -> None:
    """It was written as differences from itself, which nobody could load."""
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "whole", whole=True)
    aiether.load(tmp_path / "whole").save_pretrained(tmp_path / "again")
    assert equal(aiether.load(tmp_path / "again"), model)


def test_differences_that_were_loaded_can_be_saved_whole(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "torus")
    aiether.load(tmp_path / "torus").save_pretrained(tmp_path / "whole", whole=True)
    assert equal(aiether.load(tmp_path / "whole"), model)


def test_the_type_may_be_asked_for_by_its_former_name(base: Path, tmp_path: Path) -> None:
    retrofitted(base).save_pretrained(tmp_path / "torus")
    assert aiether.load(tmp_path / "torus", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


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


def test_a_base_is_compared_in_its_own_type_whatever_is_asked_for(base: Path, tmp_path: Path) -> None:
    retrofitted(base).save_pretrained(tmp_path / "torus")
    assert aiether.load(tmp_path / "torus", dtype=torch.bfloat16).dtype == torch.bfloat16
    LLAMA.build(depth=2, seed=1).save_pretrained(base)
    for dtype in (torch.bfloat16, "float16", "auto"):
        with pytest.raises(ValueError, match="another fingerprint"):
            aiether.load(tmp_path / "torus", dtype=dtype)


def test_settings_of_the_model_come_back_with_its_differences(base: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model: Any = AutoModelForCausalLM.from_pretrained(base, rope_parameters=rope, rms_norm_eps=1e-2)
    set_progress(aiether.retrofit(model, layers=[1], period=16), 1.0)
    model.save_pretrained(tmp_path / "torus")
    assert equal(model, aiether.load(tmp_path / "torus"))
    assert aiether.load(tmp_path / "torus", rms_norm_eps=1e-5).config.rms_norm_eps == 1e-5  # type: ignore[attr-defined]


def test_other_shapes_and_further_tensors_are_no_differences(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"\(50, .* whole=True"):
        model.save_pretrained(tmp_path / "torus")
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert equal(model, aiether.load(tmp_path / "whole"))
    model = retrofitted(base)
    model.register_buffer("further", torch.ones(2))
    with pytest.raises(ValueError, match="further"):
        model.save_pretrained(tmp_path / "torus")
    assert not (tmp_path / "torus").exists()


def test_a_model_with_another_head_is_stored_whole_and_keeps_it(base: Path, tmp_path: Path) -> None:
    model: Any = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = 0
    set_progress(aiether.retrofit(model, layers=[0], period=16), 1.0)
    with pytest.raises(ValueError, match="no model for causal language modelling"):
        model.save_pretrained(tmp_path / "torus", whole=False)
    model.save_pretrained(tmp_path / "torus")
    assert equal(model, aiether.load(tmp_path / "torus"))


def test_damaged_folders_and_lost_bases_are_told(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "torus")
    record = (tmp_path / "torus" / "toroidal.json").read_text()
    (tmp_path / "torus" / "toroidal.json").write_text(record[:50])
    with pytest.raises(ValueError, match="torus is damaged"):
        aiether.load(tmp_path / "torus")
    (tmp_path / "torus" / "toroidal.json").write_text(record)
    (tmp_path / "torus" / "toroidal.safetensors").unlink()
    with pytest.raises(ValueError, match="torus is damaged"):
        aiether.load(tmp_path / "torus")
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="cannot be loaded: give its present place"):
        model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again", base=str(tmp_path / "moved"))
    assert equal(model, aiether.load(tmp_path / "again"))


def test_a_whole_model_leaves_no_differences_behind(base: Path, tmp_path: Path) -> None:
    model = retrofitted(base)
    model.save_pretrained(tmp_path / "torus")
    model.save_pretrained(tmp_path / "torus", whole=True)
    assert not list((tmp_path / "torus").glob("toroidal.*"))


def test_terms_that_a_checkpoint_lacks_begin_where_the_configuration_says(base: Path) -> None:
    model = retrofitted(base)
    again = type(model).from_pretrained(base, config=copy.deepcopy(model.config))
    assert [float(terms.progress) for terms in torus_terms(again)] == [0.5]
    assert all(terms.active and not terms.lambda_shift.any() for terms in torus_terms(again))
