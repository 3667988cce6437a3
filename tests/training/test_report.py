"""The report of synthetic runs: whole, interrupted, never grown, often grown, with baselines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aiether.training.report import save_hero_figure, write_report
from aiether.training.report._facts import headline
from aiether.training.report._geometry import stagnant
from aiether.training.report._run import load_run, read_json_lines
from aiether.training.report._theme import DARK, LIGHT

# --- a run folder as training writes it ---------------------------------------------------------------


@dataclass(frozen=True)
class FakeRun:
    """What to make up. `growths` are (step, depth after), each one stacking copies on top."""

    steps: int = 2000
    start_depth: int = 2
    growths: tuple[tuple[int, int], ...] = ((500, 4), (1100, 8))
    name_in_config: str = "recommended"
    thresholds: str = "normalised"
    prompt: str = "def main("
    seed: int = 0
    interrupted_at: int | None = None
    geometry: bool = True
    samples: bool = True
    tensors_per_layer: Sequence[str] = field(default=("attn.c_attn.weight", "mlp.c_proj.weight"))

    def depth_at(self, step: int) -> int:
        return [self.start_depth, *[depth for at, depth in self.growths if at < step]][-1]


def write_fake_run(folder: Path, fake: FakeRun) -> Path:
    """A run folder in the documented file formats."""
    folder.mkdir(parents=True, exist_ok=True)
    end = fake.interrupted_at or fake.steps
    metrics = list(_metric_rows(fake, end))
    growths = [(step, depth) for step, depth in fake.growths if step <= end]
    _write_lines(folder / "metrics.jsonl", metrics)
    _write_lines(folder / "events.jsonl", _events(fake, growths))
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(fake)), encoding="utf-8")
    environment = {"python": "3.11.2", "torch": "2.13.0", "device": {"name": "cpu", "threads": 2}}
    (folder / "environment.json").write_text(json.dumps(environment))
    records = _records(fake.start_depth, growths)
    (folder / "lineage.json").write_text(json.dumps({"records": records, "steps": fake.steps}))
    if fake.samples:
        text = f"{fake.prompt}argv):\n    parser = <b>make</b>(argv)\n    return 0 & 1"
        sample = {"step": end, "depth": fake.depth_at(end), "prompt": fake.prompt, "text": text}
        _write_lines(folder / "samples.jsonl", [sample])
    if fake.interrupted_at is None:
        last = [row for row in metrics if row["kind"] == "eval"][-1]
        kept = ("eval_loss", "bits_per_byte", "flops", "tokens", "elapsed_s", "depth")
        summary = {"status": "finished", "steps": end, "baselines": [], **{key: last[key] for key in kept}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _config(fake: FakeRun) -> dict[str, Any]:
    return {
        "preset": fake.name_in_config,
        "trigger": "geometric" if fake.geometry else "never",
        "thresholds": fake.thresholds,
        "tau_crit": 0.5 if fake.thresholds == "normalised" else 2.0,
        "kappa_crit": 0.5,
        "n_layer": fake.start_depth,
        "max_layers": 8,
        "lr": 1e-3,
        "growth_fractions": [0.2, 0.5],
        "dataset_path": None,
    }


def _metric_rows(fake: FakeRun, end: int) -> Iterable[dict[str, Any]]:
    rng = np.random.default_rng(fake.seed)
    elapsed = flops = 0.0
    since = 0
    for step in range(1, end + 1):
        depth = fake.depth_at(step)
        since = 0 if step > 1 and depth != fake.depth_at(step - 1) else since + 1
        elapsed += 0.02 + 0.008 * depth
        flops += 6.0 * 16 * 128 * (530_000 + 200_000 * depth)
        capacity = 1.9 + 1.2 / depth**0.5
        shock = 1.6 * math.exp(-since / 25) * (step > fake.growths[0][0] if fake.growths else 0)
        loss = capacity + 6.0 * math.exp(-step / 60) + 2.4 * (1 + step / 60) ** -0.7 + shock
        common = {"step": step, "depth": depth, "flops": flops, "tokens": step * 2048, "elapsed_s": elapsed}
        if step % 5 == 0:
            yield _train_row(common, loss, shock, depth, rng)
        if step % 50 == 0:
            yield _eval_row(common, loss, depth, since, fake.geometry, rng)


def _train_row(common: dict[str, Any], loss: float, shock: float, depth: int, rng: Any) -> dict[str, Any]:
    rate = 1 / (0.02 + 0.008 * depth) * rng.normal(1, 0.03)
    return {
        "kind": "train",
        **common,
        "loss": loss + rng.normal(0, 0.09),
        "grad_norm": 0.6 + shock + rng.gamma(2, 0.08),
        "learning_rate": 1e-3,
        "steps_per_s": rate if common["step"] > 5 else None,
        "tokens_per_s": rate * 2048 if common["step"] > 5 else None,
        "stage": 0,
    }


def _eval_row(
    common: dict[str, Any], loss: float, depth: int, since: int, geometry: bool, rng: Any
) -> dict[str, Any]:
    window = min(15, since // 50 + 1)
    row = {"kind": "eval", **common, "eval_loss": loss + 0.06 + rng.normal(0, 0.012)}
    row |= {"bits_per_byte": row["eval_loss"] / 2.3, "eval_steps_per_s": 120 / (1 + depth)}
    measures = dict.fromkeys(("tau", "kappa", "tau_normalised", "kappa_normalised", "rho", "rho_straight"))
    if geometry and window >= 3:
        tau_hat = 0.25 + 0.45 * (1 - math.exp(-since / 400)) + rng.normal(0, 0.015)
        kappa_hat = tau_hat + 0.06 + rng.normal(0, 0.015)
        measures = {
            "tau_normalised": tau_hat,
            "kappa_normalised": kappa_hat,
            "tau": 1 + tau_hat * (math.sqrt(window - 1) - 1),
            "kappa": kappa_hat * math.sqrt(window - 2),
            "rho": 0.3,
            "rho_straight": (window + 1) / (3 * (window - 1)),
        }
    return row | measures | {"stagnation": 0, "num_snapshots": window if geometry else None}


def _events(fake: FakeRun, growths: Sequence[tuple[int, int]]) -> Iterable[dict[str, Any]]:
    yield {"event": "start", "step": 0, "depth": fake.start_depth}
    depth = fake.start_depth
    for step, after in growths:
        layers = [{"source": index % depth, "is_new": index >= depth} for index in range(after)]
        names = [
            f"transformer.h.{i}.{suffix}" for i in range(depth, after) for suffix in fake.tensors_per_layer
        ]
        yield {
            "event": "growth",
            "step": step,
            "depth_before": depth,
            "depth_after": after,
            "reason": "tau 0.55 >= 0.5 and kappa 0.61 >= 0.5 at 5 evaluations in a row",
            "plan": {"depth_before": depth, "layers": layers, "init": "geometric", "placement": "stack"},
            "loss_before": 3.412 - step / 5000,
            "loss_after": 4.98 - step / 5000,
            "tensors": {name: {"beta": 0.0123456, "rank": 14, "k_used": 10} for name in names},
            "seconds": 0.41,
        }
        yield {"event": "phase", "step": step, "trainable": list(range(depth, after))}
        yield {"event": "phase", "step": step + 100, "trainable": "all"}
        depth = after


def _records(start: int, growths: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    records = [_record(index, 0, None) for index in range(start)]
    for step, after in growths:
        before = len(records)
        new = [_record(index, step, records[index % before]["id"]) for index in range(before, after)]
        records = [*records, *new]
    return records


def _record(layer_id: int, born: int, parent: int | None) -> dict[str, Any]:
    init = "random" if parent is None else "geometric"
    return {"id": layer_id, "born_step": born, "parent": parent, "init": init, "placement": "stack"}


STATIC = FakeRun(steps=1500, start_depth=8, growths=(), geometry=False, samples=False, seed=1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two growths and a static baseline."""
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "2026-11-22-recommended", FakeRun())
    write_fake_run(folder / "baseline-static", STATIC)
    return folder


# --- the page as a browser reads it -------------------------------------------------------------------

VOID = {"meta", "br", "hr", "img", "input", "link", "line", "use"}


class Page(HTMLParser):
    """Checks nesting while it collects what the tests ask about."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            assert not name.startswith("on"), f"<{tag}> runs a script on {name}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))


def page_of(run_dir: Path) -> tuple[str, Page]:
    source = write_report(run_dir).read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture(scope="module")
def whole_page(whole_run: Path) -> tuple[str, Page]:
    return page_of(whole_run)


def figures_on(page: Page) -> set[str]:
    return {name.removeprefix("figure-") for name in page.ids if name.startswith("figure-")}


ALL_CURVES = {
    "loss-compute",
    "eval-loss",
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
    source, page = whole_page
    assert "http:" not in source
    assert "https:" not in source
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", source)
    assert len(page.ids) == len(set(page.ids))
    targets = [reference.removeprefix("#") for reference in page.references]
    targets += re.findall(r"url\(#([^)]+)\)", source)
    assert targets
    assert set(targets) <= set(page.ids)


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


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


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


def test_a_run_without_growth_or_geometry_shows_neither(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", FakeRun(steps=400, growths=(), geometry=False, samples=False))
    _, page = page_of(run)
    assert figures_on(page) == ALL_CURVES | {"lineage"}
    assert "It did not grow." in page.words
    assert "Growths" not in page.words


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": step, "loss": None if step == 2 else 3.0} for step in (1, 2, 3)]
    _write_lines(tmp_path / "metrics.jsonl", rows)
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
    _write_lines(tmp_path / "metrics.jsonl", rows)
    assert load_run(tmp_path).evals.column("eval_loss").tolist() == [5.0, 4.0]


def test_points_are_filled_where_both_thresholds_of_the_run_are_reached(whole_run: Path) -> None:
    run = load_run(whole_run)
    columns = [run.evals.column(f"{name}_normalised") for name in ("tau", "kappa")]
    assert stagnant(run) == [bool(tau >= 0.5 and kappa >= 0.5) for tau, kappa in zip(*columns, strict=True)]
    assert any(stagnant(run))
    assert not all(stagnant(run))


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
