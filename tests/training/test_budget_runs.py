"""`aiether train` with a budget of tokens, FLOPs or seconds, to its end."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiether.training import length
from aiether.training import run as job
from aiether.training.config import resolve
from aiether.training.trainer import PretrainingTrainer

from .corpus import write_corpus
from .tiny_run import TINY_RUN

pytestmark = pytest.mark.usefixtures("without_report")

ONE, TWO, FOUR = (3 * (layers * 7168 + 9600) * 4 * 16 for layers in (1, 2, 4))
"""FLOPs of a step: 6,144 a block for projections, 1,024 for attention, 9,600 for the head, 64 tokens."""
GEOMETRIC: dict[str, Any] = {
    "trigger": "geometric",
    "max_layers": 4,
    "tau_crit": 1e-6,
    "kappa_crit": 1e-6,
    "pg_patience": 1,
    "pg_threshold": 10.0,
    "warmup_steps": 4,
    "history_window_size": 5,
}
Train = Callable[..., job.RunResult]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "dataset_path": str(write_corpus(folder / "words.txt")),
        "cache_dir": str(folder / "cache"),
        "validation_fraction": 0.1,
        "batch_size": 4,
        "eval_batches": 2,
        "eval_interval_steps": 4,
        "collect_interval_steps": 2,
        "log_interval_steps": 1,
        "lr_warmup_steps": 2,
        "protocol": "none",
        "init": "copy",
    }


@pytest.fixture
def train(data: dict[str, Any], tmp_path: Path) -> Train:
    numbers = itertools.count()

    def run(**settings: Any) -> job.RunResult:
        folder = {"output_dir": str(tmp_path / f"run{next(numbers)}")}
        return job.train(resolve("recommended", {}, TINY_RUN | data | folder | settings))

    return run


def rows(result: job.RunResult, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (result.run_dir / name).read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("kind", row.get("event")) == kind]


def planned(result: job.RunResult) -> int:
    return json.loads((result.run_dir / "lineage.json").read_text())["steps"]


def test_arms_of_different_depths_spend_the_same_flops(train: Train) -> None:
    flops = 12 * TWO + 1.0
    shallow = train(max_flops=flops, trigger="never", max_layers=1)
    deep = train(max_flops=flops, trigger="never", n_layer=4, max_layers=4)
    grown = train(max_flops=flops)
    for result, last_step in ((shallow, ONE), (deep, FOUR), (grown, TWO)):
        assert 0 <= flops - result.grown.flops < last_step
        assert planned(result) == result.grown.steps
    assert shallow.grown.steps > grown.grown.steps > deep.grown.steps
    (growth,) = rows(grown, "events.jsonl", "growth")
    assert growth["step"] == grown.grown.steps // 2, "half of the steps, not of the FLOPs"
    assert not rows(grown, "events.jsonl", "replan"), "known before it began"


def test_growth_that_the_data_decide_is_paid_for_with_later_steps(train: Train) -> None:
    flops = 30 * ONE
    result = train(max_flops=flops, baseline="static", **GEOMETRIC)
    growths, replans = (rows(result, "events.jsonl", kind) for kind in ("growth", "replan"))
    assert [event["depth_after"] for event in growths] == [2, 4]
    assert [event["step"] for event in replans] == [event["step"] for event in growths]
    assert 30 > replans[0]["total_steps"] > replans[1]["total_steps"] == result.grown.steps == planned(result)
    assert 0 <= flops - result.grown.flops < FOUR
    assert result.baselines[0].steps == round(result.grown.flops / FOUR)
    rates = [row["learning_rate"] for row in rows(result, "metrics.jsonl", "train")]
    decay = round(0.2 * result.grown.steps)
    assert rates[-1] == pytest.approx(max(rates) / decay), "the schedule ends where the run does"


def test_probes_are_paid_for_and_none_begins_that_the_budget_is_too_small_for(train: Train) -> None:
    flops = 30 * ONE
    lag: dict[str, Any] = {"trigger": "lag", "lag_interval": 1, "lag_steps": 2, "warmup_steps": 0}
    result = train(max_flops=flops, latest_growth=1.0, **lag)
    probes, warnings = (rows(result, "events.jsonl", kind) for kind in ("probe", "warning"))
    assert probes
    assert warnings
    assert result.grown.flops <= flops
    assert flops - result.grown.flops < TWO
    evaluations = rows(result, "metrics.jsonl", "eval")
    assert evaluations[-1]["step"] == result.grown.steps == planned(result)
    assert all("the budget leaves no step to train 2 layers" in warning["text"] for warning in warnings)


def test_seconds_are_those_of_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, pauses = PretrainingTrainer.evaluate, list[float]()

    def slowly(self: PretrainingTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        time.sleep(0.2)
        pauses.append(0.2)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "evaluate", slowly)
    result = train(max_seconds=3.0, eval_interval_steps=40)
    assert sum(pauses) >= 1.0
    assert 0.75 * 3.0 < result.grown.elapsed_s < 1.25 * 3.0
    (growth,) = rows(result, "events.jsonl", "growth")
    assert result.grown.depth == 2
    assert 0 < growth["step"] < result.grown.steps
    assert planned(result) == result.grown.steps
    assert not [path for path in result.run_dir.iterdir() if path.name.startswith(".")]


def test_no_step_begins_in_overtime(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length, "seconds_per_step", lambda *_: {1: 2**-17})
    result = train(max_seconds=0.25, trigger="never", max_layers=1, eval_interval_steps=10**6)
    assert result.status == "finished"
    (warning,) = rows(result, "events.jsonl", "warning")
    assert "the run ends here, not at step 32768" in warning["text"]
    (replan,) = rows(result, "events.jsonl", "replan")
    (evaluation,) = rows(result, "metrics.jsonl", "eval")
    assert evaluation["step"] == replan["total_steps"] == planned(result) == result.grown.steps
    before = rows(result, "metrics.jsonl", "train")[-2]
    assert before["elapsed_s"] < 1.02 * 0.25 <= result.grown.elapsed_s


def test_tokens_are_whole_steps(train: Train) -> None:
    assert train(max_tokens=3 * 64 + 63, trigger="never", max_layers=1).grown.tokens == 3 * 64


def test_flops_that_are_too_few_or_too_many_are_refused_before_anything_is_written(
    train: Train, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"max_flops is 3e\+06, and one step with 1 layers takes 3.219e\+06"):
        train(max_flops=3e6)
    with pytest.raises(ValueError, match="max_flops is enough for more than 1,000,000,000 steps"):
        train(max_flops=1e25)
    assert not list(tmp_path.iterdir())
