"""Checkpoints that were damaged after they were written: named, and passed over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aiether.integrations import fit
from aiether.integrations._checkpoint import MARKER, MOMENTS, STATE, Checkpoint, CheckpointStore, RunRecord

from .test_fit import Watch, assert_same, growth, run, weights
from .tiny import tiny_trainer

SNAPSHOT = "step-00000010.safetensors"


def flip_a_bit(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a bit of the weights": ("model.safetensors", flip_a_bit, "model.safetensors is not as it was written"),
    "a bit of the moments": (MOMENTS, flip_a_bit, f"{MOMENTS} is not as it was written"),
    "a bit of the state": (STATE, lambda path: flip_a_bit(path, 0.9), f"{STATE} is not as it was written"),
    "cut": ("model.safetensors", cut, "bytes, .* were written"),
    "gone": (MOMENTS, Path.unlink, f"{MOMENTS} is missing"),
    "marker gone": (MARKER, Path.unlink, f"{MARKER} is missing"),
    "marker empty": (MARKER, lambda path: path.write_text(""), f"{MARKER} cannot be read"),
    "marker of sizes only": (MARKER, lambda path: path.write_text('{"a": 1}'), f"{MARKER} cannot be read"),
    "a snapshot gone": (f"../../snapshots/{SNAPSHOT}", Path.unlink, f"{SNAPSHOT} is missing"),
    "a bit of a snapshot": (
        f"../../snapshots/{SNAPSHOT}",
        flip_a_bit,
        f"{SNAPSHOT} is not as it was written",
    ),
}


def save_weights(directory: Path) -> None:
    save_file({"w": torch.randn(100)}, directory / "model.safetensors")


def write(store: CheckpointStore, step: int, *snapshots: int) -> Checkpoint:
    for snapshot in snapshots:
        store.write_snapshot(snapshot, {"w": torch.randn(100)})
    return store.write(
        step=step,
        stage=0,
        save_model=save_weights,
        moments={"w": {"exp_avg": torch.randn(100)}},
        record=RunRecord(total_steps=20, controller={}, snapshot_steps=list(snapshots)),
    )


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_passed_over(tmp_path: Path, kind: str) -> None:
    name, harm, says = DAMAGE[kind]
    good, bad = write(CheckpointStore(tmp_path), 5, 5), write(CheckpointStore(tmp_path), 10, 10)
    harm(bad.path / name)
    found, skipped = CheckpointStore(tmp_path).newest()
    assert found == good
    assert list(skipped) == [bad.path]
    assert re.search(says, skipped[bad.path]), skipped


def test_a_damaged_checkpoint_never_pushes_a_good_one_out(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path), 5)
    bad = write(CheckpointStore(tmp_path), 10)
    flip_a_bit(bad.path / MOMENTS)
    store = CheckpointStore(tmp_path, keep=1)
    store.newest()
    newer = write(store, 7)
    assert store.complete() == [newer]
    assert bad.path.exists(), "it may still be repaired by hand"
    write(store, 12)
    assert [path.name for path in store.directory.iterdir()] == ["step-00000012-stage-000"]


def crashed(tmp_path: Path, **settings: Any) -> CheckpointStore:
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, growth(), Watch(crash_at=13), max_steps=16, **settings)
    return CheckpointStore(tmp_path / "run")


def test_a_run_goes_on_from_the_one_before_to_the_same_bits(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", growth(), max_steps=16)
    newest = crashed(tmp_path / "cut").latest()
    assert newest is not None
    flip_a_bit(newest.path / "model.safetensors")
    watch = Watch()
    actual = run(tmp_path / "cut", growth(), watch, max_steps=16, resume=True)
    assert watch.events[0]["event"] == "damaged"
    assert watch.events[0]["checkpoint"] == newest.path.name
    assert 0 < watch.events[1]["step"] < newest.step
    assert_same(weights(expected), weights(actual))
    assert CheckpointStore(tmp_path / "cut" / "run").newest()[1] == {}, "the damaged one was replaced"


def test_nothing_complete_is_refused_instead_of_starting_over(tmp_path: Path) -> None:
    store = crashed(tmp_path)
    for checkpoint in store.complete():
        cut(checkpoint.path / "model.safetensors")
    before = sorted(path.name for path in store.directory.iterdir())
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is complete \(step-\d+-stage-\d+: model"
    ) as no:
        run(tmp_path, growth(), max_steps=16, resume=True)
    assert "\n" not in str(no.value)
    assert sorted(path.name for path in store.directory.iterdir()) == before


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    newest = crashed(tmp_path).latest()
    assert newest is not None
    flip_a_bit(newest.path / MOMENTS)
    with pytest.raises(ValueError, match=f"is damaged: {MOMENTS}"):
        fit(tiny_trainer(tmp_path, max_steps=16), growth(), resume=newest.path)
