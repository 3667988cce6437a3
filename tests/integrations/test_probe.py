"""Probes: forks of a live run, trained a little, compared and thrown away."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from aiether.growth import GrowthConfig
from aiether.integrations import OutOfMemory, Row, _probe, fit
from aiether.integrations._growth_callback import GrowthCallback

from .test_fit import Watch, assert_same, growth, run, weights
from .tiny import tiny_model, tiny_trainer


def lag(**settings: Any) -> GrowthConfig:
    """A probe at every second evaluation, that is every fourth step."""
    plain: dict[str, Any] = {
        "trigger": "lag",
        "lag_interval": 2,
        "lag_steps": 2,
        "init": "copy",
        "max_layers": 4,
    }
    return growth(**{**plain, **settings})


def probes(watch: Watch) -> list[Row]:
    return [event for event in watch.events if event["event"] == "probe"]


def growths(watch: Watch) -> list[Row]:
    return [event for event in watch.events if event["event"] == "growth"]


def losses_are(monkeypatch: pytest.MonkeyPatch, **by_candidate: float) -> None:
    """Let the forks train, and have their evaluations show these losses."""
    train, waiting = _probe.Forks.train, list[str]()

    def named(forks: _probe.Forks, candidates: Any) -> Any:
        waiting[:] = [candidate.name.replace("/", "_") for candidate in candidates]
        return train(forks, candidates)

    def evaluated(stage: _probe._ForkStage, step: int, metrics: dict[str, float]) -> bool:
        stage.loss = by_candidate[waiting.pop(0)]
        return True

    monkeypatch.setattr(_probe.Forks, "train", named)
    monkeypatch.setattr(_probe._ForkStage, "evaluated", evaluated)


def test_a_probe_that_stays_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, probed = Watch(), Watch()
    expected = run(tmp_path / "never", growth(trigger="never"), undisturbed, max_steps=14)
    losses_are(monkeypatch, stay=1.0, stack_copy=2.0)
    actual = run(tmp_path / "lag", lag(), probed, max_steps=14)
    assert [event["step"] for event in probes(probed)] == [4, 8]
    assert {event["chosen"] for event in probes(probed)} == {"stay"}
    assert_same(weights(expected), weights(actual))
    kept = [[(row["step"], row["eval_loss"]) for row in watch.evaluations] for watch in (undisturbed, probed)]
    assert kept[0] == kept[1]
    logged = [[(r["step"], r["loss"], r["learning_rate"]) for r in w.rows] for w in (undisturbed, probed)]
    assert logged[0] == logged[1]


def test_a_scheduler_and_an_optimizer_of_the_users_own_go_on_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_are(monkeypatch, stay=1.0, stack_copy=2.0)
    results = []
    for config in (growth(trigger="never"), lag()):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        folder = tmp_path / config.trigger
        trainer = tiny_trainer(folder, model, optimizers=(optimizer, scheduler), max_steps=10)
        results.append((fit(trainer, config), scheduler))
    (plain, untouched), (probed, used) = results
    assert_same(weights(plain), weights(probed))
    assert untouched.state_dict() == used.state_dict()


def test_the_run_grows_into_the_best_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    losses_are(monkeypatch, stay=3.0, stack_copy=2.0, interleave_zero=1.0)
    result = run(tmp_path, lag(lag_candidates=("stack/copy", "interleave/zero")), watch)
    grown = growths(watch)
    assert [(event["step"], event["plan"]["placement"], event["plan"]["init"]) for event in grown] == [
        (4, "interleave", "zero")
    ]
    assert "interleave/zero is best" in grown[0]["reason"]
    assert result.depth == 4
    assert len(probes(watch)) == 1


def test_forks_train_for_the_same_flops_and_the_cost_is_on_record(tmp_path: Path) -> None:
    watch = Watch()
    result = run(tmp_path, lag(latest_growth=0.2), watch)
    (probe,) = probes(watch)
    stay, copy = probe["candidates"]
    assert (stay["name"], stay["depth"], copy["name"], copy["depth"]) == ("stay", 2, "stack/copy", 4)
    assert copy["steps"] == 2 < stay["steps"] <= 4
    assert copy["flops"] <= stay["flops"] < copy["flops"] * (1 + 1 / copy["steps"])
    assert 0 < stay["eval_loss"] != copy["eval_loss"] > 0
    assert probe["flops"] == stay["flops"] + copy["flops"]
    assert probe["steps"] == stay["steps"] + copy["steps"]
    assert stay["seconds"] + copy["seconds"] <= probe["seconds"] < result.train_seconds


def test_a_fork_becomes_what_the_run_would_have_become(tmp_path: Path) -> None:
    """The only candidate of a growth that is decided: its loss is that of the run, so many steps later."""
    watch, settings = Watch(), {"eval_steps": 1, "lr_scheduler_type": "cosine", "dataloader_drop_last": True}
    form = {"lag_candidates": ("stack/copy",), "lag_steps": 7, "growth_fractions": (0.3,)}
    run(tmp_path, growth(**form, lr_policy="rewarm_new"), watch, **settings)
    (probe,), (grown,) = probes(watch), growths(watch)
    assert grown["step"] == probe["step"] == 7
    then = {row["step"]: row["eval_loss"] for row in watch.evaluations}
    assert probe["candidates"][0]["eval_loss"] == then[14]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        pytest.param(
            lag(lag_candidates=("stack/geometric", "top/noise")),
            {"own_muon": True, "max_steps": 10},
            id="muon",
        ),
        pytest.param(
            growth(
                lag_candidates=("front/geometric", "top/random"),
                lag_steps=2,
                grow_by=1,
                protocol="report",
                isolated_warmup_steps=3,
            ),
            {"gradient_accumulation_steps": 2, "max_steps": 12},
            id="form of fixed growths under the report's protocol",
        ),
    ],
)
def test_a_run_killed_in_a_probe_repeats_it_to_the_same_bits(
    tmp_path: Path, config: GrowthConfig, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = Watch(), Watch()
    expected = run(tmp_path / "whole", config, whole, **dict(settings))
    train, killed = _probe.Forks._loss_after, []

    def dies(forks: _probe.Forks, *rest: Any) -> float:
        killed.append(train(forks, *rest))
        if len(killed) in (2, 5):
            raise ConnectionError("killed")
        return killed[-1]

    monkeypatch.setattr(_probe.Forks, "_loss_after", dies)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            run(tmp_path / "cut", config, **dict(settings), resume=True)
    actual = run(tmp_path / "cut", config, resumed, **dict(settings), resume=True)
    assert_same(weights(expected), weights(actual))
    assert len(killed) > 5
    assert resumed.evaluations[-1]["eval_loss"] == whole.evaluations[-1]["eval_loss"]
    assert probes(whole)
    known = {event["step"]: [c["eval_loss"] for c in event["candidates"]] for event in probes(whole)}
    assert all(known[e["step"]] == [c["eval_loss"] for c in e["candidates"]] for e in probes(resumed))


def test_an_interrupt_in_a_probe_saves_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", lag(), max_steps=10)
    after_step, seen = _probe._ForkStage.after_step, []

    def interrupts(stage: _probe._ForkStage, step: int, evaluates: bool) -> tuple[bool, bool]:
        seen.append(step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(stage, step, evaluates)

    monkeypatch.setattr(_probe._ForkStage, "after_step", interrupts)
    cut = run(tmp_path / "cut", lag(), max_steps=10)
    assert (cut.status, cut.step, cut.depth) == ("interrupted", 4, 2)
    assert len(seen) == 2, "the fork went on after the signal"
    monkeypatch.setattr(_probe._ForkStage, "after_step", after_step)
    assert_same(weights(expected), weights(run(tmp_path / "cut", lag(), max_steps=10, resume=True)))


def test_forks_are_freed_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_model, alive, held = _probe.fork_model, [], []

    def counted(*given: Any) -> Any:
        held.append(sum(fork() is not None for fork in alive))
        model, moments, renames = fork_model(*given)
        alive.append(weakref.ref(model))
        return model, moments, renames

    monkeypatch.setattr(_probe, "fork_model", counted)
    run(tmp_path, lag(lag_candidates=("stack/copy", "top/copy"), dry_run=True), max_steps=14)
    assert len(held) == 6
    assert set(held) == {0}
    assert not any(fork() for fork in alive)


def test_a_fork_that_diverges_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    losses_are(monkeypatch, stay=float("nan"), stack_copy=9.0)
    run(tmp_path, lag(), watch)
    (probe,) = probes(watch)
    assert probe["candidates"][0]["eval_loss"] is None
    assert probe["chosen"] == "stack/copy"


def test_a_dry_run_probes_and_never_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    losses_are(monkeypatch, stay=2.0, stack_copy=1.0)
    result = run(tmp_path, lag(dry_run=True), watch, max_steps=14)
    assert result.depth == 2
    assert all("dry run: the model would grow now" in probe["reason"] for probe in probes(watch))
    assert len(probes(watch)) > 1


def test_the_users_callbacks_hear_nothing_of_forks(tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(state.global_step)

    steps = Steps()
    run(tmp_path, lag(), callbacks=[steps], max_steps=10)
    assert steps.seen == list(range(1, 11))


def test_memory_that_runs_out_in_a_probe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(_probe, "fork_model", too_large)
    with pytest.raises(OutOfMemory, match="the probe at step 4 ran out of memory") as fault:
        run(tmp_path, lag(), max_steps=10)
    assert fault.value.checkpoint is not None
    monkeypatch.undo()
    assert run(tmp_path, lag(), max_steps=10, resume=True).status == "finished"


@pytest.mark.parametrize("config", [lag(), growth(lag_candidates=("stack/copy",))])
def test_a_bare_trainer_refuses_to_probe(tmp_path: Path, config: GrowthConfig) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[GrowthCallback(config)])
    with pytest.raises(ValueError, match=r"only aiether\.fit"):
        trainer.train()


def test_a_probe_needs_a_validation_set(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, eval_strategy="no")
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        fit(trainer, growth(lag_candidates=("stack/copy",)))
