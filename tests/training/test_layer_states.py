from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import aiether.managers
from aiether.training import layer_states
from aiether.training.layer_states import LayerStateManager

STATE = {
    "attn.weight": torch.arange(6.0).reshape(2, 3),
    "ln.bias": torch.tensor([1, 2], dtype=torch.bfloat16),
}


def test_the_documented_door_and_call(tmp_path: Path) -> None:
    manager = aiether.managers.LayerStateManager(output_dir=str(tmp_path / "checkpoints"))
    path = manager.save_state(layer_id=0, state_name="L0", state_dict=STATE, step=100)
    assert path == tmp_path / "checkpoints" / "layer-000" / "L0.safetensors"
    loaded, metadata = manager.load_state(0, "L0")
    assert metadata == {"layer_id": 0, "state_name": "L0", "step": 100}
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[k], STATE[k]) and loaded[k].dtype == STATE[k].dtype for k in STATE)
    assert load_file(path).keys() == STATE.keys()  # any tool that reads safetensors reads it


def test_states_are_listed_by_layer_and_name(tmp_path: Path) -> None:
    manager = LayerStateManager(tmp_path)
    assert manager.list_states() == []
    for layer, name, step in [(11, "L0", 3), (2, "L1", 9), (2, "L0", 1), (1000, "L0", 4)]:
        manager.save_state(layer, name, STATE, step)
    listed = [(info.layer_id, info.state_name, info.step) for info in manager.list_states()]
    assert listed == [(2, "L0", 1), (2, "L1", 9), (11, "L0", 3), (1000, "L0", 4)]
    assert all(info.path.is_file() for info in manager.list_states())


def test_views_ties_and_gradients_are_saved_as_plain_tensors(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    state = {
        "a": weight,
        "tied": weight,
        "transposed": weight.T,
        "view": weight[1:, ::2],
        "scalar": torch.tensor(7),
    }
    LayerStateManager(tmp_path).save_state(0, "L0", state, 1)
    loaded, _ = LayerStateManager(tmp_path).load_state(0, "L0")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_state_whole(tmp_path: Path, monkeypatch, fault: str) -> None:
    manager = LayerStateManager(tmp_path)
    manager.save_state(0, "L0", STATE, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fault == "replace":
            patch.setattr(Path, "replace", fail)
        else:
            patch.setattr(layer_states.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            manager.save_state(0, "L0", {"attn.weight": torch.zeros(1)}, 2)
    loaded, metadata = manager.load_state(0, "L0")
    assert metadata["step"] == 1
    assert torch.equal(loaded["attn.weight"], STATE["attn.weight"])
    assert [path.name for path in (tmp_path / "layer-000").iterdir()] == ["L0.safetensors"]


def test_a_later_state_of_the_same_name_replaces_the_earlier(tmp_path: Path) -> None:
    manager = LayerStateManager(tmp_path)
    manager.save_state(0, "L0", STATE, 1)
    manager.save_state(0, "L0", {"other": torch.ones(1)}, 2)
    loaded, metadata = manager.load_state(0, "L0")
    assert (list(loaded), metadata["step"]) == (["other"], 2)


def test_a_write_that_was_killed_is_not_listed(tmp_path: Path) -> None:
    manager = LayerStateManager(tmp_path)
    path = manager.save_state(0, "L0", STATE, 1)
    (path.parent / ".L1.safetensors.77.tmp").write_bytes(b"half")
    assert [info.state_name for info in manager.list_states()] == ["L0"]


@pytest.mark.parametrize("name", ["", "../L0", "a/b", ".hidden", "L 0", "L0\n"])
def test_names_that_are_no_plain_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="use letters, digits"):
        LayerStateManager(tmp_path).save_state(0, name, STATE, 1)
    with pytest.raises(ValueError, match="use letters, digits"):
        LayerStateManager(tmp_path).load_state(0, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer_id", [-1, "0", True, 1.0])
def test_ids_are_whole_numbers(tmp_path: Path, layer_id: object) -> None:
    with pytest.raises(ValueError, match="whole number from 0"):
        LayerStateManager(tmp_path).save_state(layer_id, "L0", STATE, 1)  # pyright: ignore[reportArgumentType]


def test_what_is_no_layer_state_is_refused(tmp_path: Path) -> None:
    manager = LayerStateManager(tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        manager.save_state(0, "L0", {}, 1)
    with pytest.raises(ValueError, match=r"no tensors: \['step'\]"):
        manager.save_state(0, "L0", {"step": 3}, 1)  # pyright: ignore[reportArgumentType]
    manager.save_state(0, "L0", STATE, 1)
    with pytest.raises(ValueError, match=r"no state 'L1' of layer 4 .*saved: 0/L0"):
        manager.load_state(4, "L1")
    (tmp_path / "layer-004").mkdir()
    save_file(STATE, tmp_path / "layer-004" / "L1.safetensors")
    with pytest.raises(ValueError, match="no layer state of aiether's"):
        manager.load_state(4, "L1")
