from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aiether.geometry import Extrapolator, Trajectory, velocity_gram
from aiether.geometry import trajectory as trajectory_module

STORAGES = ["device", "host", "disk"]


def tensors(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"matrix": (5, 7), "bias": (7,), "scale": (), "kernel": (2, 3, 1, 2), "none": (0, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def filled(num_snapshots: int, window_size: int = 5, **options: Any) -> Trajectory:
    trajectory = Trajectory(window_size, **options)
    for step in range(num_snapshots):
        trajectory.append(tensors(step), step * 10)
    return trajectory


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("num_snapshots", [1, 4, 5, 6, 13])
def test_the_window_holds_the_newest_snapshots_and_their_gram(storage, num_snapshots, tmp_path):
    trajectory = filled(num_snapshots, storage=storage, directory=tmp_path)
    kept = range(max(num_snapshots - 5, 0), num_snapshots)
    assert trajectory.steps == tuple(step * 10 for step in kept)
    assert len(trajectory) == len(kept)
    for name in trajectory.names:
        expected = [tensors(step)[name] for step in kept]
        assert all(torch.equal(a, b) for a, b in zip(trajectory.snapshots(name), expected, strict=True))
        gram = trajectory.gram(name)
        assert gram.shape == (len(kept) - 1,) * 2
        if len(kept) > 1:
            torch.testing.assert_close(gram, velocity_gram(expected), rtol=1e-12, atol=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_several_tensors_are_one_point_of_the_product_space():
    trajectory = filled(7)
    flat = [torch.cat([t.flatten() for t in tensors(step).values()]) for step in range(2, 7)]
    torch.testing.assert_close(trajectory.gram(trajectory.names), velocity_gram(flat), rtol=1e-12, atol=1e-12)
    assert torch.equal(trajectory.gram(["bias", "bias"]), trajectory.gram("bias"))


@settings(deadline=None, max_examples=40)
@given(
    window_size=st.integers(2, 6),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
    asked=st.sets(st.integers(0, 20)),
    through_json=st.booleans(),
)
def test_restoring_changes_no_bit_whatever_was_asked_before(window_size, before, after, asked, through_json):
    """The Gram bits are a function of the snapshots alone: not of when they were asked for, nor of a
    restart."""
    plain, interrupted = Trajectory(window_size), Trajectory(window_size)
    for step in range(before + after):
        if step == before:
            state = interrupted.state_dict()
            state = json.loads(json.dumps(state)) if through_json else state
            saved = {
                at: {n: t.clone() for n, t in interrupted.snapshot_items(at).items()} for at in state["steps"]
            }
            interrupted = Trajectory.from_state(state, saved.__getitem__)
        for trajectory in (plain, interrupted):
            trajectory.append(tensors(step), step)
        if step in asked:
            interrupted.gram("matrix")
    assert plain.steps == interrupted.steps
    for name in plain.names:
        assert torch.equal(plain.gram(name), interrupted.gram(name))
        pairs = zip(plain.snapshots(name), interrupted.snapshots(name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_large_window_restores_to_the_same_bits_in_any_storage(storage):
    generator = torch.Generator().manual_seed(0)
    values = [{"w": torch.randn(90_000, generator=generator)} for _ in range(12)]
    first = Trajectory(6)
    for step in range(9):
        first.append(values[step], step)
    second = Trajectory.from_state(first.state_dict(), first.snapshot_items, storage=storage)
    for step in range(9, 12):
        first.append(values[step], step)
        second.append(values[step], step)
        assert torch.equal(first.gram("w"), second.gram("w"))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_changes_no_bit_and_is_left_alone(num_threads):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(90_000, generator=generator) for _ in range(6)]
    grams, before = [], torch.get_num_threads()
    try:
        for count in (1, num_threads):
            torch.set_num_threads(count)
            trajectory = Trajectory(6)
            for step, value in enumerate(values):
                trajectory.append({"w": value}, step)
            grams.append((trajectory.gram("w"), *Extrapolator().extrapolate(trajectory.snapshots("w"))[:1]))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*grams, strict=True))


def test_a_bad_snapshot_is_forgotten_once_it_has_left_the_window():
    trajectory = Trajectory(4)
    for step in range(9):
        value = torch.full((7,), float("nan")) if step == 2 else tensors(step)["bias"]
        trajectory.append({"w": value}, step)
        gram = trajectory.gram("w")
        assert bool(torch.isfinite(gram).all()) == (not 2 <= step <= 5 or gram.numel() == 0)


def test_saving_computes_nothing():
    trajectory = filled(4)
    assert trajectory.state_dict()["grams"]["matrix"] == []
    trajectory.gram("matrix")
    assert np.shape(trajectory.state_dict()["grams"]["matrix"]) == (3, 3)


@pytest.mark.parametrize("storage", STORAGES)
def test_snapshots_are_copies_of_the_tensors(storage):
    trajectory = Trajectory(3, storage)
    weight = torch.zeros(4, requires_grad=True)
    trajectory.append({"w": weight}, 0)
    with torch.no_grad():
        weight += 1
    assert torch.equal(trajectory.snapshots("w")[0], torch.zeros(4))
    assert not trajectory.snapshots("w")[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_dtype_is_kept(dtype, storage):
    trajectory = Trajectory(3, storage)
    for step in range(4):
        trajectory.append(tensors(step, dtype), step)
    assert trajectory.snapshots("matrix")[-1].dtype == dtype
    expected = velocity_gram([tensors(step, dtype)["matrix"] for step in range(1, 4)])
    torch.testing.assert_close(trajectory.gram("matrix"), expected, rtol=1e-13, atol=1e-13)


def test_arrays_are_taken_and_views_of_any_layout():
    trajectory = Trajectory(3)
    points = [np.asfortranarray(np.arange(6.0).reshape(2, 3) ** power) for power in range(3)]
    for step, point in enumerate(points):
        trajectory.append({"w": point}, step)
    assert np.array_equal(trajectory.snapshots("w")[2].numpy(), points[2])
    assert torch.equal(trajectory.gram("w"), velocity_gram(points))


def test_what_does_not_belong_is_refused_and_changes_nothing():
    trajectory = filled(6)
    steps, gram = trajectory.steps, trajectory.gram("matrix")
    bad = tensors(7)
    for change, message in (
        ({"bias": None}, "missing \\['bias'\\]"),
        ({"extra": torch.zeros(1)}, "unexpected \\['extra'\\]"),
        ({"bias": torch.zeros(8)}, "its history is \\(7,\\)"),
        ({"bias": torch.zeros(7).double()}, "torch.float64"),
        ({"bias": torch.zeros(7).long()}, "floating-point"),
    ):
        values = {name: value for name, value in {**bad, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            trajectory.append(values, 100)
    with pytest.raises(ValueError, match="does not come after step 50"):
        trajectory.append(bad, 50)
    assert trajectory.steps == steps
    assert torch.equal(trajectory.gram("matrix"), gram)


def test_errors_say_what_there_is():
    trajectory = filled(3)
    with pytest.raises(ValueError, match="matrix, bias"):
        trajectory.gram("head")
    with pytest.raises(ValueError, match="no names given"):
        trajectory.gram([])
    with pytest.raises(ValueError, match="no snapshot of step 7"):
        trajectory.snapshot_items(7)
    with pytest.raises(ValueError, match="allowed are device, host, disk"):
        Trajectory(3, "tape")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="window_size is 1"):
        Trajectory(1)
    with pytest.raises(ValueError, match="at least one named tensor"):
        Trajectory(3).append({}, 0)
    with pytest.raises(ValueError, match="missing \\['none'\\]"):
        Trajectory.from_state(
            trajectory.state_dict(),
            lambda step: {n: t for n, t in trajectory.snapshot_items(step).items() if n != "none"},
        )


def test_after_clear_other_tensors_may_come():
    trajectory = filled(6)
    trajectory.clear()
    assert (len(trajectory), trajectory.steps, trajectory.names) == (0, (), ())
    trajectory.append({"other": torch.zeros(3)}, 0)
    assert trajectory.gram("other").shape == (0, 0)


def test_disk_makes_the_folder_and_leaves_it_empty(tmp_path: Path):
    trajectory = filled(6, storage="disk", directory=tmp_path / "deep" / "folder")
    assert list((tmp_path / "deep" / "folder").iterdir()) == []
    assert trajectory.nbytes == 5 * 4 * (35 + 7 + 1 + 12)


@pytest.mark.parametrize("num_snapshots", [2, 4, 9])
def test_tensors_of_one_size_measured_together_give_what_each_gives_alone(num_snapshots, monkeypatch):
    """The way of accelerators, taken on a CPU."""

    def layers(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        sizes = {
            "0.w": (6, 5),
            "1.w": (5, 6),
            "2.w": (30,),
            "0.b": (5,),
            "1.b": (5,),
            "alone": (7,),
            "none": (0,),
        }
        return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}

    monkeypatch.setattr(trajectory_module, "_together", lambda device: True)
    monkeypatch.setattr(trajectory_module, "chunk_length", lambda rows, device: 13)
    together = Trajectory(4)
    for step in range(num_snapshots):
        together.append(layers(step), step)
        if step == 2:
            together.gram("1.w")  # asked for alone: the others of its size are behind it
    kept = range(max(num_snapshots - 4, 0), num_snapshots)
    for name in together.names:
        expected = velocity_gram([layers(step)[name] for step in kept])
        torch.testing.assert_close(together.gram(name), expected, rtol=1e-12, atol=1e-12)
    flat = [torch.cat([t.flatten() for t in layers(step).values()]) for step in kept]
    torch.testing.assert_close(together.gram(together.names), velocity_gram(flat), rtol=1e-12, atol=1e-12)
