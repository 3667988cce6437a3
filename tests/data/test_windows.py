from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import default_data_collator

from aiether.data.tokens import TokenFile
from aiether.data.windows import TokenWindows, permutation


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """The ids 0 to 999, so that a window shows where it was taken."""
    path = tmp_path / "train.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    return TokenFile(path, "<u2")


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 300))
def test_an_epoch_holds_every_window_once(seed: int, epoch: int, length: int) -> None:
    assert sorted(permutation(seed, epoch, length).tolist()) == list(range(length))


def test_epochs_and_seeds_differ_and_no_place_is_preferred() -> None:
    orders = np.stack([permutation(seed, epoch, 50) for seed in range(40) for epoch in range(10)])
    assert len(np.unique(orders, axis=0)) == len(orders)
    # 400 draws uniform over 50 places: mean 24.5, standard error 14.4 / 20 = 0.72; five of them allowed.
    assert np.abs(orders.mean(axis=0) - 24.5).max() < 3.6
    # Of neighbours in the file, 2 * 49 / (50 * 49) = 4 % stay neighbours in a random order.
    assert (np.abs(np.diff(orders, axis=1)) == 1).mean() == pytest.approx(0.04, abs=0.01)


def test_the_order_is_written_in_stone() -> None:
    # A change here would change the data of every resumed run.
    assert permutation(0, 0, 10).tolist() == [1, 0, 5, 6, 8, 4, 2, 7, 9, 3]
    assert permutation(7, 3, 10).tolist() == [1, 3, 9, 4, 5, 6, 2, 0, 8, 7]


def test_item_depends_on_seed_and_position_alone(tokens: TokenFile) -> None:
    forward = TokenWindows(tokens, 30, seed=3, num_windows=100)
    other = TokenWindows(tokens, 30, seed=3, num_windows=5000)
    positions = [99, 0, 40, 33, 32, 66, 5]
    seen = {i: forward[i]["input_ids"] for i in range(100)}
    assert all(torch.equal(other[i]["input_ids"], seen[i]) for i in positions)


def test_epochs_follow_one_another_to_the_length_asked_for(tokens: TokenFile) -> None:
    windows = TokenWindows(tokens, 30, seed=1, num_windows=80)
    assert (len(windows), windows.windows_per_epoch) == (80, 33)
    starts = [int(windows[i]["input_ids"][0]) for i in range(80)]
    whole = [30 * i for i in range(33)]
    assert sorted(starts[:33]) == whole
    assert sorted(starts[33:66]) == whole
    assert starts[:33] != starts[33:66]
    assert len(set(starts[66:])) == 14


def test_items_are_what_a_hugging_face_model_takes(tokens: TokenFile) -> None:
    item = TokenWindows(tokens, 30, seed=None)[1]
    assert item["input_ids"].tolist() == list(range(30, 60))
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["labels"], item["input_ids"])
    item["labels"][0] = -100
    assert item["input_ids"][0] == 30


def test_a_batch_holds_the_items_that_its_indices_give_one_by_one(tokens: TokenFile) -> None:
    windows = TokenWindows(tokens, 30, seed=3, num_windows=100)
    indices = [5, 0, 41, 99]
    together = default_data_collator(windows.__getitems__(indices))
    one_by_one = default_data_collator([windows[index] for index in indices])
    for name in ("input_ids", "labels"):
        assert torch.equal(together[name], one_by_one[name])
    together["labels"][0, 0] = -100
    assert together["input_ids"][0, 0] != -100


def test_without_a_seed_windows_come_in_order_and_at_most_once(tokens: TokenFile) -> None:
    windows = TokenWindows(tokens, 100, seed=None, num_windows=99)
    assert [windows.window(i) for i in range(len(windows))] == list(range(10))


def test_fewer_windows_without_a_seed_are_spread_over_the_file(tokens: TokenFile) -> None:
    windows = TokenWindows(tokens, 100, seed=None, num_windows=4)
    assert [windows.window(i) for i in range(len(windows))] == [0, 2, 5, 7]


def test_iteration_ends(tokens: TokenFile) -> None:
    windows = TokenWindows(tokens, 100, seed=0, num_windows=3)
    with pytest.raises(IndexError):
        windows[3]
    with pytest.raises(IndexError):
        windows[-1]


def test_less_than_one_window_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "validation.bin"
    np.arange(7, dtype="<u2").tofile(path)
    with pytest.raises(
        ValueError, match=r"validation data holds 7 tokens, .* context_length 8; .*validation_fr"
    ):
        TokenWindows(TokenFile(path, "<u2"), 8, seed=None)
    with pytest.raises(ValueError, match="at least 2"):
        TokenWindows(TokenFile(path, "<u2"), 1, seed=None)
