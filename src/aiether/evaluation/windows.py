"""Which windows of a text are evaluated, and which of their tokens count."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `start` to `stop` of a text; those from `first` on (counted in the window, from 0) count.

    A window's own first token has nothing before it and is never predicted, so `first` is at least 1.
    """

    start: int
    stop: int
    first: int


def cut_windows(
    num_tokens: int, context_length: int, stride: int | None = None, num_windows: int | None = None
) -> tuple[Window, ...]:
    """The windows of a text, without padding.

    Parameters
    ----------
    num_tokens: length of the text.
    context_length: tokens of a window.
    stride: None: windows side by side, each predicting all of its tokens but the first; a shorter tail is
        left out (a text shorter than a window is one window). Else windows begin `stride` tokens apart and
        count the tokens that no earlier one has: every token but the first of the text counts once. The last
        window ends with the text.
    num_windows: at most so many, spread evenly over the text.

    Raises
    ------
    ValueError
        For a text of fewer than two tokens, a context below two, a stride outside 1 to context_length - 1.
    """
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}; at least 2 is needed to predict a token")
    if num_tokens < 2:
        raise ValueError(f"the text has {num_tokens} token(s); at least 2 are needed to predict one")
    if stride is not None and not 1 <= stride < context_length:
        raise ValueError(
            f"stride is {stride}; allowed is 1 to {context_length - 1}, below the window's {context_length} "
            "tokens; leave it out for windows side by side"
        )
    if num_windows is not None and num_windows < 1:
        raise ValueError(f"windows is {num_windows}; at least 1 is needed")
    length = min(context_length, num_tokens)
    found = _side_by_side(num_tokens, length) if stride is None else _overlapping(num_tokens, length, stride)
    taken = len(found) if num_windows is None else min(num_windows, len(found))
    return tuple(found[place * len(found) // taken] for place in range(taken))


def _side_by_side(num_tokens: int, length: int) -> list[Window]:
    return [Window(number * length, (number + 1) * length, 1) for number in range(num_tokens // length)]


def _overlapping(num_tokens: int, length: int, stride: int) -> list[Window]:
    stops = [*range(length, num_tokens, stride), num_tokens]
    windows, counted = [], 1
    for stop in stops:
        windows.append(Window(stop - length, stop, counted - (stop - length)))
        counted = stop
    return windows
