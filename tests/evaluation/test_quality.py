from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.evaluation import bits_per_byte, perplexity


@given(st.integers(2, 100_000))
def test_uniform_guessing_has_the_perplexity_of_its_choices(choices: int) -> None:
    assert perplexity(math.log(choices)) == pytest.approx(choices)


def test_perplexity_is_not_clamped() -> None:
    assert perplexity(100.0) == pytest.approx(math.exp(100.0))
    assert perplexity(1e6) == math.inf


def test_a_uniform_byte_model_needs_eight_bits() -> None:
    assert bits_per_byte(math.log(256), tokens=10, nbytes=10) == pytest.approx(8.0)


@given(st.floats(0.01, 20.0), st.integers(1, 10**9), st.integers(1, 10**9), st.integers(2, 9))
def test_bits_per_byte_does_not_depend_on_how_text_is_cut(
    loss: float, tokens: int, nbytes: int, parts: int
) -> None:
    whole = bits_per_byte(loss, tokens, nbytes)
    # Every token as several that share its nats: the same code length, the same bits.
    assert bits_per_byte(loss / parts, tokens * parts, nbytes) == pytest.approx(whole)


@pytest.mark.parametrize(("tokens", "nbytes"), [(0, 5), (5, 0)])
def test_text_of_nothing_has_no_bits_per_byte(tokens: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        bits_per_byte(1.0, tokens, nbytes)
