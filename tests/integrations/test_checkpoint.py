from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aiether.integrations._checkpoint import MARKER, MOMENTS, STATE, Checkpoint, CheckpointStore, RunRecord


def save_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"weights")


def write(store: CheckpointStore, step: int, stage: int = 0, **record: Any) -> Checkpoint:
    moments = {
        "layer.weight": {"exp_avg": torch.full((2, 3), float(step)), "step": torch.tensor(3.0), "count": 7}
    }
    whole = RunRecord(**{"total_steps": 9, "controller": {}, **record})
    return store.write(step=step, stage=stage, save_model=save_weights, moments=moments, record=whole)


def test_round_trip_keeps_tensors_numbers_and_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    checkpoint = write(store, 5, controller={"a": [0.1, None]})
    assert store.latest() == checkpoint
    assert checkpoint.read_record() == RunRecord(total_steps=9, controller={"a": [0.1, None]})
    moments = checkpoint.read_moments()["layer.weight"]
    assert torch.equal(moments["exp_avg"], torch.full((2, 3), 5.0))  # type: ignore[arg-type]
    assert moments["count"] == 7
    assert isinstance(moments["count"], int)
    assert isinstance(moments["step"], torch.Tensor)
    assert moments["step"].item() == 3.0


@pytest.mark.parametrize("damage", ["marker", "file", "truncated", "temporary"])
def test_an_incomplete_checkpoint_is_never_the_latest(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    good, bad = write(store, 5), write(store, 10)
    match damage:
        case "marker":
            (bad.path / MARKER).unlink()
        case "file":
            (bad.path / MOMENTS).unlink()
        case "truncated":
            (bad.path / MOMENTS).write_bytes((bad.path / MOMENTS).read_bytes()[:-1])
        case "temporary":
            bad.path.rename(bad.path.with_name(f".{bad.path.name}.tmp"))
    assert store.latest() == good


def test_a_damaged_checkpoint_is_replaced_when_its_point_is_reached_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (write(store, 5).path / MARKER).unlink()
    again = write(store, 5)
    assert store.latest() == again


def test_the_grown_state_of_a_step_comes_after_the_ungrown_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 5, stage=0)
    grown = write(store, 5, stage=1)
    assert store.latest() == grown


def test_rotation_keeps_the_newest_and_the_snapshots_that_they_need(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 3, 4):
        for snapshot in {1, step} if step == 2 else {step}:
            store.write_snapshot(snapshot, {"w": torch.tensor([float(snapshot)])})
        write(store, step, snapshot_steps=[step - 1, step])
    assert [c.step for c in store.complete()] == [3, 4]
    assert sorted(p.name for p in store.snapshots.iterdir()) == [
        f"step-{s:08d}.safetensors" for s in (2, 3, 4)
    ]
    assert store.read_snapshot(3)["w"].item() == 3.0


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    checkpoint = write(CheckpointStore(tmp_path), 1)
    for path in checkpoint.path.iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    checkpoint = write(CheckpointStore(tmp_path), 1)
    content = json.loads((checkpoint.path / STATE).read_text())
    (checkpoint.path / STATE).write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.read_record()


def test_what_a_killed_process_left_half_written_or_half_deleted_goes_with_the_next_write(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    kept = write(store, 5)
    for name in (".step-00000006-stage-000.tmp", ".step-00000004-stage-000.old"):
        (store.directory / name).mkdir()
    store.snapshots.mkdir(exist_ok=True)
    (store.snapshots / ".tmpAbCdEf").write_bytes(b"half")  # as safetensors begins a file
    assert store.latest() == kept
    newer = write(store, 7)
    assert [path.name for path in store.directory.iterdir()] == [newer.path.name]
    assert not list(store.snapshots.iterdir())
