"""The report of made-up studies: whole, unfinished, failed, with next to nothing in them."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tests.study.report.fake_study import GROWN, STATIC, USUAL, FakeArm, FakeStudy, write_fake_study
from tests.training.html_page import Page, check_self_contained, figures_on

from aiether.study.report import markdown_tables, write_study_report
from aiether.training.report.run_records import read_json_lines
from aiether.training.report.theme import LIGHT

FIGURES = {
    *("differences", "final-loss", "effects", "loss-steps", "loss-tokens", "loss-flops", "loss-seconds"),
    *("pareto-flops", "pareto-seconds", "savings-flops", "savings-seconds", "savings-tokens"),
    *("throughput", "gradient-norm"),
}
EVIL = "<script>alert('x')</script> $x_{ _a_ | `b` & **c**"


def page_of(folder: Path) -> tuple[str, Page]:
    source = (folder / "report.html").read_text(encoding="utf-8")
    return source, Page(source)


def report_of(folder: Path, fake: FakeStudy) -> Page:
    write_study_report(write_fake_study(folder, fake))
    return page_of(folder)[1]


# --- a whole study ----------------------------------------------------------------------------------------


def test_a_whole_study_is_told_with_every_figure(whole_study: Path) -> None:
    _, page = page_of(whole_study)
    assert figures_on(page) == FIGURES
    before = page.words.partition("What each arm is")[0]
    for told in (
        "Does a model that grows reach the static model's loss for less?",
        "arm-0 against static",
        "over 3 seeds; p = 0.002 after Holm",
        "mod x latent",
        "for the same loss",
    ):
        assert told in before, told
    for title in ("Comparisons", "Factors", "Loss and what it cost", "Growths", "Learning rates", "seed 2"):
        assert title in page.words
    assert "aiether study run growth_vs_static --preset cpu" in page.words
    assert "0123456789abcdef0123456789abcdef01234567" in page.words
    assert "the paired t test" in page.words


def test_what_failed_or_is_missing_is_named_before_the_numbers(whole_study: Path) -> None:
    _, page = page_of(whole_study)
    before, _, after = page.words.partition("Verdicts")
    assert "Not finished: 2 of 39 runs are missing." in before
    assert "1 run has failed" in before
    assert "at the edge of the grid for linear+curvature" in before
    assert "failed: RuntimeError: the loss is not finite at step 212" in after
    assert re.search(r"arm-5 ?1 ?2 ?run ?has not run yet\s?arm-6 ?1 ?0 ?run ?has not run yet", after)
    assert "2 of 3" in after


def test_the_page_is_self_contained_and_follows_the_theme(whole_study: Path) -> None:
    source, page = page_of(whole_study)
    check_self_contained(source, page)
    drawings = re.findall(r"<svg viewBox.*?</svg>", source, flags=re.S)
    assert len(drawings) == len(FIGURES)
    for drawing in drawings:
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) == set()
        assert set(re.findall(r"var\(--(\w+)\)", drawing)) <= set(LIGHT)
    assert len(source) < 1_500_000


def test_every_figure_lies_beside_the_page_as_svg_and_pdf(whole_study: Path) -> None:
    files = {path.name for path in (whole_study / "figures").iterdir()}
    assert files == {f"{key}.{ending}" for key in FIGURES for ending in ("svg", "pdf")}
    for key in FIGURES:
        root = ET.parse(whole_study / "figures" / f"{key}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        pdf = (whole_study / "figures" / f"{key}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"CreationDate" not in pdf
    curves = (whole_study / "figures" / "loss-steps.svg").read_text(encoding="utf-8")
    assert ">arm-7</text>" in curves, "the file has no legend of its own"
    assert "arm-1: 3→6 layers at step 80 to 82" in curves


def test_the_numbers_of_the_tables_are_those_of_the_raw_records(whole_study: Path) -> None:
    folders = [whole_study / f"cells/0-1.4-seed{seed}" for seed in (0, 1, 2)]
    lasts = [read_json_lines(folder / "metrics.jsonl")[-1] for folder in folders]
    table = (whole_study / "tables.md").read_text(encoding="utf-8").partition("### What came out")[2]
    row = next(line for line in table.splitlines() if line.startswith("| static | 1.4 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[7] == f"{fmean(last['eval_loss'] for last in lasts):.3f}"
    assert cells[9] == f"{fmean(last['bits_per_byte'] for last in lasts):.3f}"
    assert cells[-1] == "3 of 3"


def test_the_markdown_is_what_the_function_gives_and_its_tables_are_whole(whole_study: Path) -> None:
    results = json.loads((whole_study / "results.json").read_text(encoding="utf-8"))
    text = markdown_tables(results)
    assert text == (whole_study / "tables.md").read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block
    assert "| comparison | seeds | difference |" in text


def test_what_all_arms_share_is_told_with_the_text_that_they_were_tuned_on(whole_study: Path) -> None:
    results = json.loads((whole_study / "results.json").read_text(encoding="utf-8"))
    assert "how it is converted" not in markdown_tables(results)
    results["study"]["shared"] = {
        "base": {"n_layer": 32, "dataset_path": "own"},
        "pretrain": {"max_steps": 8000},
        "retrofit": {"train_size": 200, "dataset_path": ["one", "other"]},
    }
    results["environment"]["tuned_on"] = ["d4fe46ff"]
    text = markdown_tables(results)
    assert "| settings of every run | n\\_layer 32, dataset\\_path own |" in text
    assert "| the model that runs begin with, trained by | max\\_steps 8000 |" in text
    assert "| how it is converted and tuned | train\\_size 200, dataset\\_path one, other |" in text
    assert "| tuned\\_on | d4fe46ff |" in text


def test_which_evaluation_counts_is_said(whole_study: Path) -> None:
    results = json.loads((whole_study / "results.json").read_text(encoding="utf-8"))
    last = "that of the last evaluation, in nats per token"
    assert last in markdown_tables(results)
    results["study"]["judged"] = "best"
    text = markdown_tables(results)
    assert last not in text
    assert (
        "each run's lowest, in nats per token, and its steps, tokens, FLOPs and time are those up to" in text
    )


# --- next to nothing --------------------------------------------------------------------------------------

SMALL = replace(USUAL, steps=60, seeds=(0, 1))
LONE = FakeStudy(
    {"only": FakeArm()}, baseline=None, seeds=(0,), steps=60, tuned=False, metric="bits_per_byte"
)


def test_one_condition_with_one_seed_has_a_page_and_equal_records_give_equal_files(tmp_path: Path) -> None:
    page = report_of(tmp_path / "one", LONE)
    assert figures_on(page) == FIGURES - {
        *("differences", "effects", "pareto-flops", "pareto-seconds"),
        *("savings-flops", "savings-seconds", "savings-tokens"),
    }
    assert "Nothing was planned to be compared." in page.words
    assert "bits per byte" in page.words
    (tmp_path / "one" / "figures" / "effects.svg").write_text("of an earlier report")
    (tmp_path / "one" / "figures" / "mine.svg").write_text("the user's own")
    before = contents(tmp_path / "one")
    write_study_report(tmp_path / "one")
    after = contents(tmp_path / "one")
    assert before.keys() - after.keys() == {"figures/effects.svg"}
    assert {name: before[name] for name in after} == after


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_of_which_nothing_has_run_says_so(tmp_path: Path) -> None:
    runs = [(name, length) for name, arm in USUAL.arms.items() for length in arm.lengths]
    fake = replace(SMALL, missing=frozenset((*run, seed) for run in runs for seed in (0, 1)))
    page = report_of(tmp_path / "study", fake)
    assert figures_on(page) == set()
    assert "Not finished: 12 of 12 runs are missing." in page.words
    assert "0 of 2" in page.words


def test_an_arm_that_failed_whole_a_baseline_of_one_length_and_hostile_texts(tmp_path: Path) -> None:
    fake = FakeStudy(
        {"static": replace(STATIC, lengths=(1.0,)), EVIL: replace(GROWN, about=EVIL), "_lost": GROWN},
        seeds=(0, 1),
        steps=60,
        failed={("_lost", 1.0, seed): EVIL + "\x1b[31m\ud800" for seed in (0, 1)},
        name=EVIL,
        question=EVIL,
        command=EVIL,
    )
    folder = write_fake_study(tmp_path / "study", fake)
    edit(folder, lambda results: results.update(equal_cost=[], savings=[], tuning=None))
    edit(folder, nothing_known)
    write_study_report(folder)
    source, page = page_of(folder)
    assert "<script" not in source
    assert page.words.count(EVIL) > 10
    assert "2 runs have failed" in page.words
    assert "_lost" in page.words
    assert "0 of 2" in page.words
    assert {"final-loss", "pareto-flops", "loss-seconds"} <= figures_on(page)
    assert not {"savings-flops", "effects"} & figures_on(page)
    check_self_contained(source, page)
    text = (folder / "tables.md").read_text(encoding="utf-8")
    assert "<script" not in re.sub(r"\\<|``.*?``", "", text)
    for path in (folder / "figures").glob("*.svg"):
        ET.parse(path)


def nothing_known(results: dict[str, Any]) -> None:
    """Numbers that are null, absent or no numbers, wherever a study may not know them."""
    first = results["arms"][1]
    first["parameters"] = None
    first["cells"][0] |= {"flops": None, "metric": float("nan"), "timings": None}
    del first["lr"]
    results["comparisons"][0] |= {"ci95": None, "t_p": None, "detectable": float("inf"), "verdict": None}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")


def test_a_lost_record_and_a_gap_are_told(tmp_path: Path) -> None:
    folder = write_fake_study(tmp_path / "study", LONE)
    metrics = folder / "cells/0-1-seed0/metrics.jsonl"
    metrics.write_text(json.dumps({"kind": "missing", "step": 40}) + "\n")
    write_study_report(folder)
    assert "metrics.jsonl of cells/0-1-seed0: rows after step 40 are missing." in page_of(folder)[1].words
    shutil.rmtree(metrics.parent)
    write_study_report(folder)
    assert "cells/0-1-seed0 holds no metrics.jsonl: the curves lack it." in page_of(folder)[1].words


# --- what is refused --------------------------------------------------------------------------------------


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no results\.json.*`aiether study run`"):
        write_study_report(tmp_path)


def arm_with(cell: Any) -> list[dict[str, Any]]:
    return [{"condition": "a", "length": 1, "cells": [cell]}]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("study", None, "study is missing"),
        ("arms", "many", "arms is no list"),
        ("arms", arm_with({"seed": 0.5}), r"arms\[0\]\.cells\[0\]\.seed is no whole number"),
        ("arms", arm_with(7), r"arms\[0\]\.cells\[0\] is no object"),
        ("comparisons", [{"arm": "a", "ci95": [1]}], r"comparisons\[0\]\.ci95 is no interval"),
        ("savings", [{"arm": "a", "cost": "tokens", "savings": ["x"]}], r"savings\[0\]\.savings holds"),
    ],
)
def test_damaged_results_are_named_with_what_to_do(tmp_path: Path, key: str, value: Any, told: str) -> None:
    folder = write_fake_study(tmp_path / "study", LONE)
    edit(folder, lambda results: results.update({key: value}))
    with pytest.raises(ValueError, match=rf"results\.json is damaged \({told}.*Run `aiether study run`"):
        write_study_report(folder)
    assert not (folder / "report.html").exists()


def test_results_that_are_no_json_and_cells_outside_the_study_are_refused(tmp_path: Path) -> None:
    folder = write_fake_study(tmp_path / "study", LONE)
    edit(folder, lambda results: results["arms"][0]["cells"][0].update(folder="../../elsewhere"))
    with pytest.raises(ValueError, match="outside the study's folder"):
        write_study_report(folder)
    (folder / "results.json").write_text('{"study": ')
    with pytest.raises(ValueError, match="it is no JSON"):
        write_study_report(folder)
