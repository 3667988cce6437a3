"""Two-level factorials: Box, Hunter & Hunter's pilot plant, least squares, designs that are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from tests.study.statistics.published import PILOT_PLANT, PILOT_PLANT_EFFECTS

from aiether.study.statistics import compare_planned, factorial

ORDER = [(t, c, k) for k in (-1, 1) for c in (-1, 1) for t in (-1, 1)]


def plant() -> dict[tuple[int, ...], dict[int, float]]:
    """The two runs of each cell as two seeds."""
    return {cell: dict(enumerate(runs)) for cell, runs in zip(ORDER, PILOT_PLANT, strict=True)}


def noisy(seeds: int = 6) -> dict[tuple[bool, ...], dict[int, float]]:
    """The first factor lowers by 0.4, and by 0.8 with the third; each seed has its own level."""
    rng = np.random.default_rng(3)
    level = rng.normal(4.0, 1.0, seeds)
    return {
        (a, b, c): {s: level[s] - 0.4 * a - 0.4 * (a and c) + rng.normal(0.0, 0.02) for s in range(seeds)}
        for a, b, c in itertools.product((False, True), repeat=3)
    }


def test_the_pilot_plant() -> None:
    effects = {effect.effect: effect.mean for effect in factorial(plant(), ("T", "C", "K"))}
    assert effects == pytest.approx(PILOT_PLANT_EFFECTS)
    assert (
        list(effects) == list(PILOT_PLANT_EFFECTS) == ["T", "C", "K", "T x C", "T x K", "C x K", "T x C x K"]
    )


def test_a_contrast_is_twice_the_coefficient_of_least_squares_in_each_seed() -> None:
    values = noisy()
    signs = np.array([[1 if level else -1 for level in cell] for cell in values])
    columns = [
        signs[:, list(s)].prod(axis=1) for size in (1, 2, 3) for s in itertools.combinations(range(3), size)
    ]
    design = np.column_stack([np.ones(8), *columns])
    effects = factorial(values, ("mod", "latent", "memory"))
    for seed in range(6):
        outcome = [each[seed] for each in values.values()]
        coefficients = np.linalg.lstsq(design, np.array(outcome), rcond=None)[0]
        assert [effect.differences[seed] for effect in effects] == pytest.approx(2 * coefficients[1:])


def test_effects_are_tested_over_seeds_and_corrected_over_the_family() -> None:
    effects = {e.effect: e for e in factorial(noisy(), ("mod", "latent", "memory"))}
    mod, both = effects["mod"], effects["mod x memory"]
    assert mod.t_p == pytest.approx(stats.ttest_1samp(mod.differences, 0.0).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    assert mod.mean == pytest.approx(-0.6, abs=0.02)
    assert both.mean == pytest.approx(-0.2, abs=0.02)
    family = compare_planned({name: effect.differences for name, effect in effects.items()})
    for name, effect in effects.items():
        assert (effect.t_p_holm, effect.sign_flip_p_holm) == (
            family[name].t_p_holm,
            family[name].sign_flip_p_holm,
        )
        assert effect.distinguishable == (name in ("mod", "memory", "mod x memory"))
    assert mod.verdict.startswith("lower by 0.6")
    assert both.verdict.startswith("interaction of -0.2")
    assert "after Holm" in both.verdict


def test_a_declared_family_is_corrected_and_the_rest_is_exploratory() -> None:
    values = noisy()
    main = {e.effect: e for e in factorial(values, ("mod", "latent", "memory"), family="main")}
    chosen = {e.effect: e for e in factorial(values, ("mod", "latent", "memory"), family=["mod x memory"])}
    alone = compare_planned({name: main[name].differences for name in ("mod", "latent", "memory")})
    assert main["mod"].t_p_holm == alone["mod"].t_p_holm
    both = main["mod x memory"]
    assert (both.t_p_holm, both.sign_flip_p_holm, both.distinguishable) == (None, None, False)
    assert both.verdict.startswith("exploratory: interaction of -0.2")
    assert chosen["mod x memory"].t_p_holm == chosen["mod x memory"].t_p == both.t_p
    assert chosen["mod"].verdict.startswith("exploratory: lower")


def test_a_seed_that_lacks_a_cell_is_left_out_of_every_effect() -> None:
    values = noisy()
    del values[(True, False, True)][4]
    for effect in factorial(values, ("mod", "latent", "memory")):
        assert (effect.n, effect.seeds, effect.left_out) == (5, (0, 1, 2, 3, 5), (4,))
    values[(True, True, True)].clear()
    assert {e.verdict for e in factorial(values, ("a", "b", "c"))} == {"no seeds: no test"}


def test_which_level_is_low_turns_the_sign() -> None:
    values = {("on",): {0: 1.0, 1: 2.0, 2: 4.0}, ("off",): {0: 3.0, 1: 3.0, 2: 3.0}}
    (first,) = factorial(values, ["mod"])
    (declared,) = factorial(values, ["mod"], levels={"mod": ("off", "on")})
    assert first.differences == (2.0, 1.0, -1.0)
    assert declared.differences == (-2.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "factors", "arguments", "words"),
    [
        ({(0,): {0: 1.0}, (1,): {0: 1.0}, (2,): {0: 1.0}}, ["depth"], {}, "'depth' has the levels 0, 1, 2"),
        ({(0,): {0: 1.0}}, ["depth"], {}, "'depth' has the levels 0;"),
        ({(0, 0): {}, (0, 1): {}, (1, 0): {}}, ["a", "b"], {}, r"no values for \(1, 1\)"),
        ({(0, 0): {}, (1,): {}}, ["a", "b"], {}, "has 1 levels for 2 factors"),
        ({(0,): {}, (1,): {}}, ["a"], {"levels": {"a": (0, 2)}}, r"levels \(0, 2\) of factor 'a'"),
        ({(0,): {}, (1,): {}}, ["a"], {"family": ["b"]}, "family .'b'.; the effects are a"),
        ({(0,): {}, (1,): {}}, ["a"], {"family": []}, "family .*; the effects are a"),
        ({(0, 0): {}, (1, 1): {}}, ["a", "a"], {}, "each once"),
        ({(0,): {0: float("nan")}, (1,): {0: 1.0}}, ["a"], {}, "NaN"),
    ],
)
def test_what_is_no_full_two_level_design_is_refused(values, factors, arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        factorial(values, factors, **arguments)
