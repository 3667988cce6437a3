"""Real signals, sent to this process at every kind of moment: the run saves and goes on exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from aiether.growth import GrowthConfig, controller
from aiether.integrations import CheckpointStore, FitResult, Interrupted, fit

from .test_fit import Watch, assert_same, growth, weights
from .tiny import Sequences, tiny_trainer

STEPS = 16


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


class Acting(Sequences):
    """Does something, once, when an item is read while a condition holds."""

    def __init__(self, length: int, seed: int, when: Callable[[], bool]) -> None:
        super().__init__(length, seed)
        self.when, self.reads_after = when, -1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.reads_after >= 0 or self.when():
            self.reads_after += 1
            if self.reads_after == 0:
                send()
        return super().__getitem__(index)


def trainer(folder: Path, **settings: Any) -> Trainer:
    plain = {"max_steps": STEPS, "eval_steps": 4, "save_steps": 7, "per_device_eval_batch_size": 1}
    return tiny_trainer(folder, train_sampling_strategy="sequential", **{**plain, **settings})


Whole = Callable[..., tuple[FitResult, Watch]]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run that no signal disturbs, once for each configuration."""
    done: dict[str, tuple[FitResult, Watch]] = {}

    def run(config: GrowthConfig, **settings: Any) -> tuple[FitResult, Watch]:
        key = f"{config} {settings}"
        if key not in done:
            watch, folder = Watch(), tmp_path_factory.mktemp("whole")
            done[key] = fit(trainer(folder, **settings), config, observers=[watch]), watch
        return done[key]

    return run


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timings = {"train_seconds", "eval_seconds", "eval_steps_per_s"}
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


AT_ONCE = growth(trigger="geometric", tau_crit=1e-6, kappa_crit=1e-6, pg_patience=1, pg_threshold=9.0)
PHASES = growth(protocol="report", isolated_warmup_steps=3, growth_fractions=(5 / STEPS,))


@pytest.mark.parametrize(
    ("step", "config"),
    [
        pytest.param(4, AT_ONCE, id="at which the model grows"),
        pytest.param(STEPS, AT_ONCE, id="the last"),
        pytest.param(8, PHASES, id="at the end of a phase"),
    ],
)
def test_a_long_evaluation_ends_early_and_is_made_up_for(
    whole_run: Whole, tmp_path: Path, step: int, config: GrowthConfig
) -> None:
    expected, all_of_it = whole_run(config)
    stopped, first, second = trainer(tmp_path), Watch(), Watch()
    stopped.eval_dataset = items = Acting(8, 2, lambda: stopped.state.global_step == step)
    result = fit(stopped, config, observers=[first])
    assert (result.status, result.signal, result.step) == ("interrupted", "SIGTERM", step)
    assert items.reads_after < 4, "the evaluation went on"
    actual = fit(trainer(tmp_path), config, resume=True, observers=[second])
    assert actual.status == "finished"
    assert_same(weights(expected), weights(actual))
    assert timeless(first.evaluations + second.evaluations) == timeless(all_of_it.evaluations)
    assert timeless(first.rows + second.rows) == timeless(all_of_it.rows)
    told = [
        event["step"] for watch in (first, second) for event in watch.events if event["event"] != "resume"
    ]
    assert told == [event["step"] for event in all_of_it.events]


def test_a_step_of_many_batches_is_given_up_in_the_middle(whole_run: Whole, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 4, "max_steps": 6, "per_device_train_batch_size": 2}
    expected, all_of_it = whole_run(growth(), **settings)
    stopped, first, second = trainer(tmp_path, **settings), Watch(), Watch()

    def begins(self: Any, *args: Any) -> torch.Tensor:
        if stopped.state.global_step == 3:
            send()
        return step_of(self, *args)

    step_of = type(stopped).training_step
    stopped.training_step = begins.__get__(stopped)  # type: ignore[method-assign]
    result = fit(stopped, growth(), observers=[first])
    assert (result.status, result.step) == ("interrupted", 3)
    actual = fit(trainer(tmp_path, **settings), growth(), resume=True, observers=[second])
    assert_same(weights(expected), weights(actual))
    assert timeless(first.rows + second.rows) == timeless(all_of_it.rows)


def test_in_a_growth_the_grown_model_is_saved(
    whole_run: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = whole_run(growth(growth_fractions=(0.3,)))
    honest = controller.migrate

    def migrate(*args: Any, **kwargs: Any) -> Any:
        send()
        return honest(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(controller, "migrate", migrate)
        result = fit(trainer(tmp_path), growth(growth_fractions=(0.3,)))
    assert (result.status, result.depth, result.num_growths) == ("interrupted", 4, 1)
    resumed = fit(trainer(tmp_path), growth(growth_fractions=(0.3,)), resume=True)
    assert_same(weights(expected), weights(resumed))


def test_in_a_save_no_further_step_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CheckpointStore.write

    def write(self: CheckpointStore, *, step: int, **kwargs: Any) -> Any:
        if step == 7:
            send()
        return honest(self, step=step, **kwargs)

    monkeypatch.setattr(CheckpointStore, "write", write)
    result = fit(trainer(tmp_path), growth(growth_fractions=(0.7,)))
    assert (result.status, result.step, result.checkpoint.name) == (
        "interrupted",
        7,
        "step-00000007-stage-000",
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(tmp_path: Path, number: int, status: int) -> None:
    class Twice(Watch):
        def on_step(self, step: int, train_seconds: float) -> None:
            if step == 3:
                send(number)
                send(number)
                raise AssertionError("it went on")

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stop:
        fit(trainer(tmp_path), growth(), observers=[Twice()])
    assert stop.value.exit_status == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert not (tmp_path / "run" / "run.lock").exists()
