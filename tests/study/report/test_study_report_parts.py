"""What the figures and sentences of a study's report are made of."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.study.report.fake_study import MANY, USUAL, write_fake_study
from tests.training.fake_runs import write_lines

from aiether.study.report._curves import band_of, read_records
from aiether.study.report._figures import LOSS_FIGURES, lines_of, loss_picture
from aiether.study.report._pareto import front_of, pareto_picture, points_of
from aiether.study.report._results import Study, read_results
from aiether.study.report._rows import savings as pictures_of_savings
from aiether.study.report._styles import styles_of
from aiether.study.report._tables import speed_up, spent_and_baseline
from aiether.study.report._words import findings, p_value, share
from aiether.training.report.run_records import read_json_lines
from aiether.training.report.theme import ARM_DASHES, DARK, LIGHT, house_style


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read_results(write_fake_study(tmp_path_factory.mktemp("study"), USUAL))


def test_a_band_is_mean_least_and_greatest_of_the_seeds() -> None:
    x = np.array([0.0, 5.0, 10.0])
    band = band_of([(x, np.array([4.0, 3.0, 2.0])), (x, np.array([3.0, 3.0, 3.0]))], points=5)
    assert band is not None
    assert band.x.tolist() == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert band.mean == pytest.approx([3.5, 3.25, 3.0, 2.75, 2.5])
    assert band.low == pytest.approx([3.0, 3.0, 3.0, 2.5, 2.0])
    assert band.high == pytest.approx([4.0, 3.5, 3.0, 3.0, 3.0])
    assert not band.stretched
    assert band_of([(np.array([1.0, np.nan]), np.array([1.0, 1.0]))]) is None


def test_a_seed_that_took_ten_times_as_long_still_counts_whole() -> None:
    quick, slow = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    band = band_of([(quick, np.array([4.0, 2.0])), (slow, np.array([4.0, 3.0]))], points=3)
    assert band is not None
    assert band.x.tolist() == [5.5, 8.25, 11.0]
    assert band.mean.tolist() == [4.0, 3.25, 2.5]
    assert band.stretched


def test_the_front_is_what_nothing_beats(study: Study) -> None:
    points = points_of(study, "flops")
    assert len(points) == 6
    front = front_of(points)
    for point in points:
        beaten = any(
            other.cost <= point.cost and other.loss <= point.loss and other is not point for other in points
        )
        assert (point in front) == (not beaten)
    assert [point.cost for point in front] == sorted(point.cost for point in front)


def test_savings_turn_into_what_the_baseline_would_have_spent(study: Study) -> None:
    saving = next(each for each in study.savings if each.arm == "growth" and each.cost == "flops")
    pairs = spent_and_baseline(study, saving)
    assert len(pairs) == saving.n == 4, "the seed outside the baseline's lengths has no figure"
    for (own, theirs), value in zip(pairs, saving.values, strict=False):
        assert 1 - own / theirs == pytest.approx(value)
    assert speed_up(saving) == pytest.approx(1 / (1 - saving.mean))


def test_planned_comparisons_come_first_and_one_not_made_is_told(study: Study) -> None:
    titles = [each.title for each in findings(study)]
    assert titles == ["Planned comparisons", "At equal cost", "Cost of the same loss"]
    about = [verdict.about for verdict in findings(study)[0].verdicts]
    assert about == ["growth against static", "random-time against static"]
    short = replace(study, comparisons=study.comparisons[:1])
    assert findings(short)[0].verdicts[1].sentences == ("not compared yet",)


def test_numbers_in_words() -> None:
    assert [p_value(each) for each in (0.0004, 0.0625, math.nan)] == ["< 0.001", "0.062", "–"]
    assert share(-0.08) == "−8\N{NO-BREAK SPACE}%"


# --- colours --------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes 2009: what is seen with no L, M or S cones, in linear RGB.
SIGHT = {
    "usual": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def oklab(colour: str, sight: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIGHT[sight] @ linear, 0, 1)
    to_cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ seen)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_arms_can_be_told_apart_whatever_one_sees(palette: dict[str, str], sight: str) -> None:
    """0.02 is where two colours beside each other can just be told apart; lines of one dash keep 0.1."""
    for one, other in itertools.combinations(range(len(ARM_DASHES)), 2):
        distance = np.linalg.norm(oklab(palette[f"arm{one}"], sight) - oklab(palette[f"arm{other}"], sight))
        needed = 0.1 if ARM_DASHES[one] == ARM_DASHES[other] else 0.05
        assert distance > needed, (one, other)


def test_each_condition_has_a_look_of_its_own_and_the_baseline_the_first(tmp_path: Path) -> None:
    study = read_results(write_fake_study(tmp_path, MANY))
    styles = styles_of(study)
    assert styles["static"].role == "arm0"
    assert len(set(styles.values())) == len(styles) == 10


def test_of_several_baselines_each_has_its_curve_and_rows_name_theirs(study: Study) -> None:
    both = replace(study, baselines=("random-time", "static"))
    assert both.conditions == ("random-time", "static", "growth")
    with house_style():
        one, two = (pictures_of_savings(each)[0].description for each in (study, both))
        pareto = pareto_picture(both, "flops")
    assert "growth 1." in one
    assert "growth against static 1." in two
    assert pareto is not None
    assert "The line is static through its lengths" in pareto.caption, "random-time has but one length"


def test_a_verdict_that_names_no_cost_is_given_its_name(study: Study) -> None:
    unknown = [replace(each, verdict="no saving known") for each in study.savings[:3]]
    (verdict,) = findings(replace(study, savings=tuple(unknown)))[-1].verdicts
    assert verdict.sentences == (
        "tokens: no saving known",
        "FLOPs: no saving known",
        "training time: no saving known",
    )


def test_an_arm_without_a_curve_is_named_below_the_figure(tmp_path: Path) -> None:
    study = read_results(write_fake_study(tmp_path, replace(USUAL, seeds=(0, 1), steps=40)))
    for path in tmp_path.glob("cells/1-*/metrics.jsonl"):
        write_lines(path, [row for row in read_json_lines(path) if row["kind"] == "eval"][-1:])
    records, _ = read_records(study, tmp_path)
    with house_style():
        picture = loss_picture(study, lines_of(study, records), LOSS_FIGURES[0])
    assert picture is not None
    assert picture.caption.endswith("Without a curve, for want of two evaluations: growth.")
    assert [entry.label for entry in picture.legend] == ["static", "random-time", "layers added"]
