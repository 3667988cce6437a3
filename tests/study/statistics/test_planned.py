"""The family of planned comparisons, and the sentence for each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.study.statistics.published import HOLM_AFTER, HOLM_BEFORE, NEUHAUS

from aiether.study.statistics import compare_planned, detectable_dz, holm, paired, verdict

CLEAR = [-0.031 + x for x in (0.006, -0.006, 0.004, -0.004, 0.0)]
NOISE = [0.01, -0.012, 0.004, 0.003, -0.006]
P_VALUES = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8)


def test_published_examples_of_holm() -> None:
    assert holm(HOLM_BEFORE) == pytest.approx(HOLM_AFTER)
    adjusted = holm(NEUHAUS)
    assert [p is not None and p <= 0.05 for p in adjusted] == [True] * 3 + [False] * 12
    assert adjusted[3] == pytest.approx(12 * 0.0095)


@settings(max_examples=40, deadline=None)
@given(P_VALUES)
def test_holm_raises_every_p_keeps_their_order_and_stays_below_bonferroni(ps: list[float]) -> None:
    adjusted = [p for p in holm(ps) if p is not None]
    assert len(adjusted) == len(ps)
    for raw, after in zip(ps, adjusted, strict=True):
        assert raw <= after * (1 + 1e-12)
        assert after <= min(1.0, len(ps) * raw) * (1 + 1e-12)
    in_order = [adjusted[i] for i in np.argsort(ps, kind="stable")]
    assert in_order == sorted(in_order)


def test_a_comparison_without_a_test_still_counts_in_the_family() -> None:
    assert holm([0.01, None, None]) == [pytest.approx(0.03), None, None]
    assert holm([None]) == [None]
    assert holm([]) == []
    assert compare_planned({}) == {}


def test_a_family_is_tested_and_corrected_together() -> None:
    family = compare_planned({"clear": CLEAR, "noise": NOISE, "one": [0.2], "none": []})
    alone = paired(CLEAR)
    clear, noise = family["clear"], family["noise"]
    assert list(family) == ["clear", "noise", "one", "none"]
    assert alone.t_p is not None
    assert clear.t_p == alone.t_p
    assert clear.t_p_holm == pytest.approx(4 * alone.t_p)
    assert clear.sign_flip_p_holm == pytest.approx(4 * 0.0625)
    assert clear.distinguishable
    assert not noise.distinguishable
    assert clear.verdict == "lower by 0.031 ± 0.006 over 5 seeds; p < 0.001 after Holm"
    assert noise.detectable == pytest.approx(noise.sd * detectable_dz(5, 0.05 / 4)) if noise.sd else False
    assert noise.verdict == "not distinguishable: 5 seeds could have shown 0.02"
    assert [family[name].verdict for name in ("one", "none")] == ["one seed: no test", "no seeds: no test"]


def test_the_declared_test_decides() -> None:
    five = compare_planned({"a": CLEAR, "b": NOISE, "c": NOISE}, test="sign_flip")["a"]
    assert not five.distinguishable
    assert five.verdict == "not distinguishable: 5 seeds cannot reach p = 0.017 in a sign-flip test, 7 can"
    seven = [*CLEAR, -0.03, -0.033]
    enough = compare_planned({"a": seven, "b": NOISE, "c": NOISE}, test="sign_flip")["a"]
    assert enough.distinguishable
    with pytest.raises(ValueError, match="'wilcoxon'; the tests are t, sign_flip"):
        compare_planned({"a": CLEAR}, test="wilcoxon")  # pyright: ignore[reportArgumentType]


def test_one_comparison_is_not_corrected() -> None:
    (only,) = compare_planned({"a": CLEAR}).values()
    assert only.t_p_holm == only.t_p
    assert only.verdict.endswith("p < 0.001")


def test_the_words_of_a_verdict() -> None:
    higher = paired([-x for x in CLEAR])
    assert (
        verdict(higher, 0.002, comparisons=3) == "higher by 0.031 ± 0.006 over 5 seeds; p = 0.002 after Holm"
    )
    words = verdict(higher, 0.0231, higher_is_better=True)
    assert words == "higher (better) by 0.031 ± 0.006 over 5 seeds; p = 0.023"
    assert verdict(paired(CLEAR), 0.02, higher_is_better=True).startswith("lower (worse) by 0.031")
    assert verdict(paired([0.0] * 5), 1.0) == "no difference in any of 5 seeds"
    assert verdict(paired([0.5] * 5), 0.0) == "higher by 0.50 ± 0.00 over 5 seeds; p < 0.001"
    rounding = paired([0.3 - 0.2, 0.1, 0.1])
    assert verdict(rounding, 0.0) == "higher by 0.10000 ± 0.00000 over 3 seeds; p < 0.001"
    assert verdict(paired(CLEAR), 0.01, interaction=True).startswith("interaction of -0.031 ± 0.006")


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1.0, "lower by 30.2 ± 1.8 over"),
        (10.0, "lower by 302 ± 18 over"),
        (100.0, "lower by 3,020 ± 180 over"),
        (1e16, "lower by 3.02e+17 ± 1.8e+16 over"),
        (1e-4, "lower by 0.00302 ± 0.00018 over"),
    ],
)
def test_value_and_error_end_at_one_place(scale: float, words: str) -> None:
    result = paired([scale * x for x in (-31.0, -29.0, -32.0, -28.5, -30.5)])
    assert verdict(result, 0.001).startswith(words)
