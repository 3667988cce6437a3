"""The report of synthetic runs: whole, interrupted, never grown, often grown, with baselines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.training.fake_runs import STATIC, FakeRun, write_fake_run, write_lines
from tests.training.html_page import Page, check_self_contained, contrast, figures_on

from aiether.training.report import save_hero_figure, write_report
from aiether.training.report._facts import gaps, headline, samples
from aiether.training.report._geometry import stagnant
from aiether.training.report.run_records import load_run, read_json_lines
from aiether.training.report.theme import DARK, LIGHT


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two growths and a static baseline."""
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "2026-11-22-recommended", FakeRun())
    write_fake_run(folder / "baseline-static", STATIC)
    return folder


# --- the page ------------------------------------------------------------------------------------------


def page_of(run_dir: Path) -> tuple[str, Page]:
    source = write_report(run_dir).read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture(scope="module")
def whole_page(whole_run: Path) -> tuple[str, Page]:
    return page_of(whole_run)


ALL_CURVES = {
    "loss-compute",
    "loss-steps",
    "loss-tokens",
    "loss-time",
    "train-loss",
    "train-speed",
    "eval-speed",
    "gradient-norm",
    "learning-rate",
}


def test_a_whole_run_is_told_with_every_figure(whole_page: tuple[str, Page]) -> None:
    _, page = whole_page
    assert figures_on(page) == ALL_CURVES | {"lineage", "tau", "kappa"}
    assert "from 2 to 8 layers, in 2,000 steps" in page.words
    assert "Not finished" not in page.words
    assert "stack, geometric: 0-1 +0-1" in page.words
    assert "the static model of 8 layers" in page.words


def test_the_page_is_self_contained_and_its_ids_are_its_own(whole_page: tuple[str, Page]) -> None:
    check_self_contained(*whole_page)


def test_colours_follow_the_theme(whole_page: tuple[str, Page]) -> None:
    source, _ = whole_page
    drawings = re.findall(r"<svg viewBox.*?</svg>", source, flags=re.S)
    assert len(drawings) == len(ALL_CURVES) + 3
    for drawing in drawings:
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) == set()
        assert set(re.findall(r"var\(--(\w+)\)", drawing)) <= set(LIGHT)
        assert "font-family" not in drawing


def test_both_palettes_have_the_same_roles_and_no_colour_twice() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_every_line_and_word_stands_out_from_the_paper(palette: dict[str, str]) -> None:
    """WCAG 2.2: 4.5 for text, 3 for lines that carry meaning."""
    decoration = {"paper", "axis", "grid"}
    for role in palette.keys() - decoration:
        needed = 4.5 if role in ("ink", "muted", "growth") else 3.0
        assert contrast(palette[role], palette["paper"]) >= needed, role


def test_each_figure_has_a_title_and_a_description(whole_page: tuple[str, Page]) -> None:
    source, page = whole_page
    assert source.count('role="img"') == len(ALL_CURVES) + 3
    for key in figures_on(page):
        assert f'aria-labelledby="{key}-title"' in source
        assert f'id="{key}-title"' in source


def test_what_a_run_wrote_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"'"
    fake = FakeRun(
        steps=300, growths=((100, 3),), name_in_config=evil, prompt=evil, tensors_per_layer=(evil,)
    )
    run = write_fake_run(tmp_path / "a & b", fake)
    source, page = page_of(run)
    assert "<script" not in source
    assert page.words.count(evil) >= 3


def test_an_interrupted_run_is_reported_as_far_as_it_went(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", FakeRun(interrupted_at=730))
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "step": 73')  # killed in the middle of a line
    _, page = page_of(run)
    assert "Not finished (interrupted): this is what was recorded up to step 730." in page.words
    assert figures_on(page) == ALL_CURVES | {"lineage", "tau", "kappa"}


def test_what_is_missing_in_the_records_is_told(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", FakeRun())
    gap = {"kind": "missing", "step": 600}
    metrics = read_json_lines(run / "metrics.jsonl")
    kept = [row for row in metrics if row["step"] <= 600], [row for row in metrics if row["step"] > 900]
    write_lines(run / "metrics.jsonl", [*kept[0], gap, *kept[1]])
    write_lines(run / "samples.jsonl", [gap])
    whole = write_fake_run(run / "baseline-static", STATIC)
    write_lines(whole / "events.jsonl", [{"kind": "missing", "step": 0}])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for told in (
        "metrics.jsonl of run: rows after step 600 are missing. Figures and tables here lack them.",
        "samples.jsonl of run: rows after step 600 are missing.",
        "events.jsonl of static: rows after step 0 are missing.",
    ):
        assert told in page.words
    assert headline(load_run(whole)).endswith("Its growths are not on record.")


def test_a_finished_run_whose_record_ends_early_is_told(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", FakeRun())
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if row["step"] <= 1500]
    write_lines(run / "metrics.jsonl", rows)
    assert gaps(load_run(run)) == (
        "metrics.jsonl of run: rows after step 1,500 are missing. Figures and tables here lack them.",
    )


def test_a_run_without_growth_or_geometry_shows_neither(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", FakeRun(steps=400, growths=(), geometry=False, samples=False))
    _, page = page_of(run)
    assert figures_on(page) == ALL_CURVES | {"lineage"}
    assert "It did not grow." in page.words
    assert "Growths" not in page.words


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": step, "loss": None if step == 2 else 3.0} for step in (1, 2, 3)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    _, page = page_of(tmp_path)
    assert figures_on(page) == {"train-loss"}


def test_a_run_that_has_recorded_nothing_yet_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    _, page = page_of(tmp_path)
    assert "Nothing has been recorded yet." in page.words
    assert figures_on(page) == set()


def test_many_growths_and_a_long_run_stay_small(tmp_path: Path) -> None:
    growths = tuple((200 * i, 1 + i) for i in range(1, 24))
    run = write_fake_run(tmp_path / "run", FakeRun(steps=8000, start_depth=1, growths=growths))
    source, page = page_of(run)
    assert len(source) < 700_000
    assert source.count('id="lineage-layer-') == 24
    assert "Grew 23 times" in page.words


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnot json\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_json_lines(path)


def test_of_steps_recorded_twice_the_last_counts(tmp_path: Path) -> None:
    rows = [
        {"kind": "eval", "step": step, "eval_loss": loss} for step, loss in ((1, 5.0), (2, 9.0), (2, 4.0))
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert load_run(tmp_path).evals.column("eval_loss").tolist() == [5.0, 4.0]


def test_points_are_filled_where_both_thresholds_of_the_run_are_reached(whole_run: Path) -> None:
    run = load_run(whole_run)
    columns = [run.evals.column(f"{name}_normalised") for name in ("tau", "kappa")]
    assert stagnant(run) == [bool(tau >= 0.5 and kappa >= 0.5) for tau, kappa in zip(*columns, strict=True)]
    assert any(stagnant(run))
    assert not all(stagnant(run))


def test_each_stage_has_its_sample_and_many_are_folded(whole_page: tuple[str, Page], tmp_path: Path) -> None:
    _, page = whole_page
    for title in ("2 layers, step 500", "4 layers, step 1,100", "8 layers, step 2,000", "static, 8 layers"):
        assert title in page.words.replace("\N{NO-BREAK SPACE}", " ")
    growths = tuple((50 * i, 1 + i) for i in range(1, 9))
    run = load_run(write_fake_run(tmp_path / "run", FakeRun(steps=500, start_depth=1, growths=growths)))
    shown, folded = samples(run)
    assert [sample.title.replace("\N{NO-BREAK SPACE}", " ") for sample in shown] == [
        "1 layer, step 50",
        *[f"{depth} layers, step {50 * depth}" for depth in (5, 6, 7, 8)],
        "9 layers, step 500",
    ]
    assert len(folded) == 3


# --- the hero figure ----------------------------------------------------------------------------------


def test_the_hero_figure_is_a_picture(whole_run: Path, tmp_path: Path) -> None:
    png = save_hero_figure(whole_run, tmp_path / "new" / "hero.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    svg = save_hero_figure(whole_run, tmp_path / "hero.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "prefers-color-scheme: dark" in svg
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert "static, 8" in svg
    assert 'id="hero-layer-7"' in svg


def test_the_hero_figure_refuses_other_formats_and_empty_runs(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither \.svg nor \.png"):
        save_hero_figure(whole_run, tmp_path / "hero.jpg")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no evaluation or no lineage"):
        save_hero_figure(tmp_path, tmp_path / "hero.png")


def test_headline_of_one_layer_is_singular(tmp_path: Path) -> None:
    run = load_run(write_fake_run(tmp_path, FakeRun(steps=100, start_depth=1, growths=(), geometry=False)))
    assert headline(run) == "Trained 1\N{NO-BREAK SPACE}layer for 100 steps. It did not grow."
