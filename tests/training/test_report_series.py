"""The numbers under the report: series, comparisons with baselines, the places of layers in a lineage."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aiether.training.report._facts import cost_tables, verdicts
from aiether.training.report._lineage import age_role, birth_steps, layer_outline, position_at
from aiether.training.report.run_records import Layer, Run, load_run
from aiether.training.report.series import compare, cost_to_reach, frame, smooth, thin

# --- what the numbers mean ----------------------------------------------------------------------------


def test_the_verdict_reads_both_at_equal_compute_whoever_wins(tmp_path: Path) -> None:
    run = _two_curves(tmp_path, mine=[(1.0, 4.0), (2.0, 3.0)], theirs=[(1.0, 3.5), (3.0, 2.5)])
    comparison = compare(run, run.baselines[0])
    assert comparison is not None
    assert comparison.flops == 2.0
    assert comparison.loss == 3.0
    assert comparison.baseline_loss == pytest.approx(3.0)
    assert comparison.target == 3.0
    assert comparison.saving == pytest.approx(0.0)
    assert "level with" in verdicts(run)[0]


@pytest.mark.parametrize(("last_loss", "word"), [(2.5, "below"), (3.5, "above")])
def test_the_verdict_names_the_winner(tmp_path: Path, last_loss: float, word: str) -> None:
    run = _two_curves(tmp_path, mine=[(1.0, 4.0), (2.0, last_loss)], theirs=[(1.0, 4.0), (2.0, 3.0)])
    at_equal_compute, at_equal_loss = verdicts(run)
    assert f"0.500 nats {word} the other model" in at_equal_compute.replace("\N{NO-BREAK SPACE}", " ")
    assert ("% less" if word == "below" else "% more") in at_equal_loss.replace("\N{NO-BREAK SPACE}", " ")


def test_curves_without_common_compute_are_not_compared(tmp_path: Path) -> None:
    run = _two_curves(tmp_path, mine=[(1.0, 4.0), (2.0, 3.0)], theirs=[(5.0, 3.5), (6.0, 2.5)])
    assert compare(run, run.baselines[0]) is None
    assert verdicts(run) == ()


def test_the_same_loss_is_priced_in_all_that_it_can_be_counted_in(tmp_path: Path) -> None:
    run = _two_curves(tmp_path, mine=[(1.0, 4.0), (2.0, 2.0)], theirs=[(1.0, 4.0), (2.0, 3.5), (4.0, 3.0)])
    (table,) = cost_tables(run)
    assert table.columns == ("to a loss of 3.000", "this run", "other", "saved")
    rows = {row[0]: row[1:] for row in table.rows}
    assert set(rows) == {"steps", "FLOPs"}, "nothing is said of what was not recorded"
    assert rows["FLOPs"] == ("1.50×10⁰", "4.00×10⁰", "62\N{NO-BREAK SPACE}%")
    (static,) = cost_tables(replace(run.baselines[0], baselines=(run,)))
    assert static.rows[-1][-1] == "−167\N{NO-BREAK SPACE}%"


def _two_curves(folder: Path, mine: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> Run:
    for path, curve in ((folder, mine), (folder / "baseline-other", theirs)):
        path.mkdir(exist_ok=True)
        rows = [{"kind": "eval", "step": i, "flops": x, "eval_loss": y} for i, (x, y) in enumerate(curve)]
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_run(folder)


def test_compute_to_reach_a_loss_is_interpolated_and_infinite_when_never() -> None:
    flops, losses = np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.0, 3.0])
    assert cost_to_reach(flops, losses, target=3.0) == pytest.approx(1.5)
    assert cost_to_reach(flops, losses, target=4.0) == 1.0
    assert cost_to_reach(flops, losses, target=1.0) == math.inf


def test_thinning_keeps_order_and_extremes() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[1234], y[40_000], y[77] = 50.0, -50.0, np.nan
    thin_x, thin_y = thin(x, y, limit=1000)
    assert len(thin_x) <= 1000
    assert (np.diff(thin_x) > 0).all()
    assert (thin_y.max(), thin_y.min()) == (50.0, -50.0)
    assert np.array_equal(thin_y, y[thin_x.astype(int)])


def test_smoothing_keeps_constants_and_never_crosses_a_growth() -> None:
    x = np.arange(1.0, 1001.0)
    y = np.where(x <= 400, 2.0, 5.0)
    assert np.allclose(smooth(x, y, breaks=[400]), y)
    assert not np.allclose(smooth(x, y), y)


def test_the_frame_holds_the_minimum_but_not_a_lone_spike() -> None:
    losses = np.linspace(4.0, 2.0, 500)
    losses[250] = 100.0
    limits = frame([losses])
    assert limits is not None
    assert limits[0] < 2.0
    assert 3.5 < limits[1] < 10.0
    assert frame([np.array([np.nan])]) is None


def test_the_frame_of_a_constant_is_of_its_own_size() -> None:
    limits = frame([np.full(20, 1e-3)])
    assert limits is not None
    assert limits[0] < 1e-3 < limits[1] < 2e-3


# --- the lineage --------------------------------------------------------------------------------------

# Front placement, twice: 0 1 -> 2' 0 1 -> 3' 2' 0 1, each new layer made from the lowest one.
FRONT = (
    Layer(3, 200, 2, "copy"),
    Layer(2, 100, 0, "copy"),
    Layer(0, 0, None, "random"),
    Layer(1, 0, None, "random"),
)


def test_old_layers_move_up_when_new_ones_come_in_below() -> None:
    assert [position_at(0, FRONT, step) for step in (0, 99, 100, 200)] == [1, 1, 2, 3]
    assert birth_steps(FRONT) == [0, 100, 200]


def test_a_layer_leaves_its_parents_line_and_ends_at_its_place() -> None:
    births = birth_steps(FRONT)
    born = np.asarray(layer_outline(FRONT[1], FRONT, births, end=300, width=10).vertices)
    assert tuple(born[0]) == (100, 1)  # where its parent, layer 0, stood until then
    assert tuple(born[-1]) == (300, 2)
    oldest = np.asarray(layer_outline(FRONT[2], FRONT, births, end=300, width=10).vertices)
    assert tuple(oldest[0]) == (0, 1)
    assert tuple(oldest[-1]) == (300, 3)


@pytest.mark.parametrize("generations", [1, 2, 6, 7, 40])
def test_generations_use_the_whole_scale_of_colours(generations: int) -> None:
    roles = [age_role(index, generations) for index in range(generations)]
    assert roles == sorted(roles)
    assert roles[0] == 0
    assert max(roles) == min(generations - 1, 5)
    assert roles.count(0) == 1
