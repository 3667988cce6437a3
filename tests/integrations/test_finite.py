"""Losses, gradients and weights that become infinite or NaN, from real batches and real updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from aiether.integrations import CheckpointStore, FitResult, RunFault, fit
from aiether.integrations._finite import FiniteWatch, NotFinite, not_finite

from .test_fit import Watch, assert_same, growth, muon, weights
from .tiny import Sequences, tiny_model, tiny_trainer

STEPS, BATCH = 16, 4


class WithEmptyBatches(Sequences):
    """No label counts in some batches: their mean loss is 0/0, and so is every gradient."""

    def __init__(self, *steps: int) -> None:
        super().__init__(STEPS * BATCH, seed=1)
        self.empty = {BATCH * (step - 1) + item for step in steps for item in range(BATCH)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        return item | {"labels": torch.full_like(item["labels"], -100)} if index in self.empty else item


def trainer(folder: Path, *empty: int, **settings: Any) -> Trainer:
    plain: dict[str, Any] = {"max_steps": STEPS, "eval_steps": 4, "save_steps": 5, "logging_steps": 1}
    own = settings.pop("own_muon", False)
    model = tiny_model()
    if own:
        settings["optimizers"] = (muon(model), None)
    made = tiny_trainer(
        folder,
        model,
        train_sampling_strategy="sequential",
        **{**plain, **settings},
    )
    made.train_dataset = WithEmptyBatches(*empty)
    return made


def saved(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    found = CheckpointStore(folder / "run").complete()
    return {c.step: load_file(c.path / "model.safetensors") for c in found}


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_stop_names_the_step_and_what_is_left(tmp_path: Path, clip: float) -> None:
    with pytest.raises(RunFault, match=r"^step 8: the loss or the gradient norm is not finite") as fault:
        fit(trainer(tmp_path, 8, max_grad_norm=clip), growth())
    assert "\n" not in str(fault.value)
    assert "on_nan=skip" in str(fault.value)
    newest = CheckpointStore(tmp_path / "run").latest()
    assert newest is not None
    assert fault.value.checkpoint == newest.path
    assert str(newest.path) in str(fault.value)
    assert newest.step == 5
    for tensors in saved(tmp_path).values():
        assert not_finite(tensors.items()) is None


def skipping(folder: Path, *empty: int, **settings: Any) -> tuple[FitResult, Watch]:
    watch, config = Watch(settings.pop("crash_at", None)), settings.pop("config", growth())
    resume, most = settings.pop("resume", False), settings.pop("max_skipped_steps", 10)
    made = trainer(folder, *empty, **settings)
    result = fit(made, config, resume=resume, observers=[watch], on_nan="skip", max_skipped_steps=most)
    return result, watch


@pytest.mark.parametrize("settings", [{}, {"own_muon": True}], ids=["adamw", "an own muon"])
def test_skip_leaves_weights_and_moments_of_that_step_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = growth(trigger="never", init="copy")
    result, watch = skipping(tmp_path, 8, save_steps=1, max_steps=10, config=config, **settings)
    assert result.status == "finished"
    (skip,) = [event for event in watch.events if event["event"] == "skip"]
    assert (skip["step"], skip["back_to_step"]) == (8, 7)
    at = saved(tmp_path)
    assert_same(at[7], at[8])
    assert any(not torch.equal(at[8][name], at[9][name]) for name in at[8])
    moments = {c.step: c.read_moments() for c in CheckpointStore(tmp_path / "run").complete()}
    for name, entries in moments[7].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[8][name][key]))
    rows = {row["step"]: row for row in watch.rows}
    assert (rows[8]["loss"], rows[8]["grad_norm"]) == (None, None)
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for step, row in rows.items() if step != 8)


def test_a_training_row_averages_the_steps_that_count(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"config": growth(trigger="never", init="copy"), "save_steps": 100}
    _, single = skipping(tmp_path / "1", 8, **settings)
    _, fours = skipping(tmp_path / "4", 8, logging_steps=4, **settings)
    loss = {row["step"]: row["loss"] for row in single.rows}
    assert fours.rows[-3]["step"] == 8
    assert fours.rows[-3]["loss"] == pytest.approx((loss[5] + loss[6] + loss[7]) / 3)
    assert fours.rows[-2]["loss"] == pytest.approx(sum(loss[step] for step in range(9, 13)) / 4)


def test_two_skips_from_one_checkpoint_and_a_crash_end_at_the_same_bits(tmp_path: Path) -> None:
    """Back to the start for the first, too; the second finds the first again on its way."""
    expected, whole = skipping(tmp_path / "whole", 2, 8, 9)
    for crash_at in (4, 9):
        with pytest.raises(RuntimeError, match="crash"):
            skipping(tmp_path / "cut", 2, 8, 9, crash_at=crash_at, resume=True)
    actual, resumed = skipping(tmp_path / "cut", 2, 8, 9, resume=True)
    assert_same(weights(expected), weights(actual))
    assert [e["step"] for e in whole.events if e["event"] == "skip"] == [2, 8, 8, 9]  # 8 told again after 9
    newest = CheckpointStore(tmp_path / "cut" / "run").latest()
    assert newest is not None
    assert [skip["step"] for skip in newest.read_record().skips] == [2, 8, 9]
    assert resumed.evaluations[-1]["eval_loss"] == whole.evaluations[-1]["eval_loss"]


def test_skips_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(
        RunFault, match=r"^step 9: .* with 1 of at most 1 steps skipped already.*Raise max_skip"
    ):
        skipping(tmp_path, 8, 9, max_skipped_steps=1)


def test_an_update_that_ruins_the_weights_is_found_and_never_saved(tmp_path: Path) -> None:
    def ruin(model: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e38

    from .tiny import AtStep

    made = trainer(
        tmp_path, save_steps=1, optim="sgd", callbacks=[AtStep(6, ruin)], lr_scheduler_type="constant"
    )
    with pytest.raises(RunFault, match=r"^step [78]: the (weights or moments|loss or the gradient norm)"):
        fit(made, growth(trigger="never", init="copy"))
    for tensors in saved(tmp_path).values():
        assert not_finite(tensors.items()) is None


def test_a_broken_evaluation_set_ends_in_one_line(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.eval_dataset = WithEmptyBatches(*range(1, STEPS + 1))
    with pytest.raises(RunFault, match=r"^step 4: the evaluation loss after it is not finite"):
        fit(made, growth())


def test_weights_that_are_not_finite_are_refused_at_the_start(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with torch.no_grad():
        next(iter(made.model.parameters()))[3, 3] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"wte.weight' holds infinite or NaN"):
        fit(made, growth())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose waits it forbids")
def test_watching_does_not_wait_for_the_device() -> None:
    watch, norms = FiniteWatch(), torch.ones(20, device="cuda")
    norms[7] = float("inf")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(20):
            watch.note(step, norms[0], norms[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NotFinite) as found:
        watch.look()
    assert found.value.step == 7


def test_a_users_own_optimizer_and_schedule_go_back_to_the_start_too(tmp_path: Path) -> None:
    rates: list[dict[int, float]] = []
    for name, empty in (("plain", ()), ("skipping", (2, 3))):
        model, watch = tiny_model(), Watch()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        made = tiny_trainer(
            tmp_path / name,
            model,
            max_steps=STEPS,
            eval_steps=4,
            save_steps=50,
            logging_steps=1,
            optimizers=(optimizer, scheduler),
            train_sampling_strategy="sequential",
        )
        made.train_dataset = WithEmptyBatches(*empty)
        fit(made, growth(trigger="never", init="copy"), observers=[watch], on_nan="skip")
        rates.append({row["step"]: row["learning_rate"] for row in watch.rows})
        assert [event["step"] for event in watch.events if event["event"] == "skip"][-len(empty) :] == [
            *empty
        ]
    assert rates[0] == rates[1]
