from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.geometry.histories import history

from aiether.geometry import gram as gram_module
from aiether.geometry import reference, velocity_gram
from aiether.geometry.gram import add_velocities

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, num_snapshots=st.integers(2, 20), seed=st.integers(0, 2**31))
def test_entries_are_the_inner_products_of_the_velocities(shape, num_snapshots, seed):
    snapshots = history("walk", shape, num_snapshots, seed)
    velocity = reference.velocities(list(snapshots.numpy()))
    expected = velocity @ velocity.T
    torch.testing.assert_close(
        velocity_gram(list(snapshots)),
        torch.from_numpy(expected),
        rtol=1e-12,
        atol=1e-12 * np.abs(expected).max(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_differences_of_low_precision_snapshots_are_taken_exactly(dtype):
    snapshots = [snapshot.to(dtype) for snapshot in history("walk", (5, 7), 6, seed=1)]
    velocity = torch.stack([s.double().flatten() for s in snapshots]).diff(dim=0)
    torch.testing.assert_close(velocity_gram(snapshots), velocity @ velocity.T, rtol=1e-13, atol=1e-13)


def test_more_elements_than_a_chunk_give_the_same_sums(monkeypatch):
    snapshots, weights = list(history("walk", (37, 29), 6, seed=2)), torch.arange(5.0).double()
    whole, moved = velocity_gram(snapshots), add_velocities(snapshots, weights)
    monkeypatch.setattr(gram_module, "_CPU_ELEMENTS", 600)
    torch.testing.assert_close(velocity_gram(snapshots), whole, rtol=1e-13, atol=1e-12)
    assert torch.equal(add_velocities(snapshots, weights), moved)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_no_bit_and_are_left_alone(num_threads, monkeypatch):
    monkeypatch.setattr(gram_module, "_PIECE_ELEMENTS", 1000)
    snapshots, weights = list(history("walk", (80, 93), 6, seed=2)), torch.arange(5.0).double()
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, num_threads):
            torch.set_num_threads(count)
            results.append((velocity_gram(snapshots), add_velocities(snapshots, weights)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*results, strict=True))
    velocity = torch.stack(snapshots).flatten(1).diff(dim=0)
    torch.testing.assert_close(results[1][0], velocity @ velocity.T, rtol=1e-12, atol=1e-9)


def test_arrays_and_tensors_and_layouts_are_the_same_to_it():
    points = history("walk", (4, 6), 5, seed=3)
    expected = velocity_gram(list(points))
    assert torch.equal(velocity_gram(list(points.numpy())), expected)
    fortran = [np.asfortranarray(snapshot) for snapshot in points.numpy()]
    assert torch.equal(velocity_gram(fortran), expected)
    strided = [snapshot.t().contiguous().t() for snapshot in points]
    assert torch.equal(velocity_gram(strided), expected)
    read_only = points.numpy().astype(">f8")
    read_only.flags.writeable = False
    assert torch.equal(velocity_gram(list(read_only)), expected)


def test_the_sum_of_velocities_moves_the_last_snapshot():
    points = history("walk", (3, 4), 5, seed=4)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    expected = points[-1] + torch.einsum("t,tij->ij", weights, points.diff(dim=0))
    torch.testing.assert_close(add_velocities(list(points), weights), expected)
    half = add_velocities(list(points.bfloat16()), torch.zeros(4))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, points[-1].bfloat16())


@pytest.mark.parametrize("size", [1.0, 1e3, 1e8])
def test_the_sum_is_rounded_once_however_large_the_coefficients(size):
    """A path of length 1/size with coefficients of that size: what naive sums lose to cancellation."""
    points = (
        1 + history("walk", (500,), 6, seed=5).sub(history("walk", (500,), 6, seed=5)[0]) / size
    ).float()
    weights = size * torch.tensor([0.5, -1.0, 2.0, 0.25, -0.75], dtype=torch.float64)
    exact = points[-1].double() + weights @ points.double().diff(dim=0)
    error = (add_velocities(list(points), weights).double() - exact).abs()
    assert bool((error <= exact.abs() * 2.0**-24 * 1.01 + 1e-8).all())


def test_what_is_no_trajectory_is_refused():
    with pytest.raises(ValueError, match="needs at least 2"):
        velocity_gram([torch.zeros(3)])
    with pytest.raises(ValueError, match="snapshot 1 has shape"):
        velocity_gram([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(ValueError, match="floating-point"):
        velocity_gram([torch.zeros(3, dtype=torch.long)] * 2)
    with pytest.raises(ValueError, match="widest supported is float64"):
        velocity_gram([np.zeros(3, dtype=np.longdouble)] * 2)


def test_an_empty_tensor_has_not_moved():
    assert torch.equal(velocity_gram([torch.zeros(0, 3)] * 4), torch.zeros(3, 3, dtype=torch.float64))
