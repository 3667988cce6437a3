from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.evaluation import Window, cut_windows


def test_side_by_side_the_tail_is_left_out_as_in_training() -> None:
    assert cut_windows(11, 4) == (Window(0, 4, 1), Window(4, 8, 1))


def test_fewer_windows_are_spread_over_the_text() -> None:
    assert [window.start for window in cut_windows(40, 4, num_windows=3)] == [0, 12, 24]
    assert len(cut_windows(40, 4, num_windows=99)) == 10


def test_overlapping_windows_end_with_the_text() -> None:
    assert cut_windows(11, 4, stride=2) == (
        Window(0, 4, 1),
        Window(2, 6, 2),
        Window(4, 8, 2),
        Window(6, 10, 2),
        Window(7, 11, 3),
    )


@given(st.integers(2, 60), st.integers(2, 12), st.integers(1, 11))
def test_with_a_stride_every_token_but_the_first_counts_once(tokens: int, length: int, stride: int) -> None:
    if stride >= length:
        return
    windows = cut_windows(tokens, length, stride)
    counted = [start + place for start, stop, first in windows for place in range(first, stop - start)]
    assert counted == list(range(1, tokens))
    assert all(start >= 0 and stop - start == min(length, tokens) for start, stop, _ in windows)


def test_a_text_shorter_than_a_window_is_one() -> None:
    assert cut_windows(3, 8) == cut_windows(3, 8, stride=2) == (Window(0, 3, 1),)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((1, 4), "at least 2"), ((9, 1), "context_length is 1"), ((9, 4, 4), "1 to 3"), ((9, 4, 0), "1 to 3")],
    ids=str,
)
def test_what_predicts_nothing_is_refused(arguments: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cut_windows(*arguments)
