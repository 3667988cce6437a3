"""A Trainer's checkpoint of 6 layers becomes one of 12 from which a plain Trainer goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.offline.files import Payload, prove
from tests.integrations.tiny import AtStep, tiny_model, tiny_trainer, values
from transformers import Trainer, TrainerCallback

from aiether.growth import GrowthConfig, family_of, renames
from aiether.integrations.offline import grow_checkpoint

COPY = GrowthConfig(init="copy", placement="interleave")
Moments = dict[str, dict[str, Any]]


class AtStart(TrainerCallback):
    """Notes weights, moments and learning rate by name once a resumed Trainer has loaded everything."""

    trained: dict[str, torch.Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)
        self.step, self.weights = state.global_step, values(model)
        self.moments: Moments = {
            name: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inner.state[p].items()}
            for name, p in model.named_parameters()
            if p in inner.state
        }
        self.rates = [group["lr"] for group in inner.param_groups]
        self.decays = [group["weight_decay"] for group in inner.param_groups]


def resumed(
    folder: Path, checkpoint: Path, depth: int, arch: str = "llama", **settings: Any
) -> tuple[Trainer, AtStart]:
    """A user's Trainer around a model of their own, resumed the documented way and trained to its end."""
    start = AtStart()
    model = tiny_model(arch, depth, dropout=0.0, seed=9)
    trainer = tiny_trainer(folder, model, max_steps=12, save_steps=4, callbacks=[start], **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    start.trained = values(model)
    return trainer, start


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"weight_decay": 0.1}),
        ("gpt2", {"weight_decay": 0.1, "optim": "adamw_torch"}),
        ("qwen3", {"optim": "adafactor"}),
    ],
    ids=["fused AdamW", "AdamW and tied tensors", "Adafactor"],
)
def test_training_goes_on(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    small = tiny_trainer(
        tmp_path / "small", tiny_model(arch, 6, dropout=0.0), max_steps=12, save_steps=4, **settings
    )
    small.train()
    checkpoint = tmp_path / "small" / "run" / "checkpoint-8"
    _, before = resumed(tmp_path / "again", checkpoint, 6, arch, **settings)

    grown = grow_checkpoint(checkpoint, tmp_path / "grown", to_layers=12, growth=COPY)
    assert (grown.kind, grown.step, grown.has_optimizer) == ("trainer", 8, True)
    trainer, after = resumed(tmp_path / "large", tmp_path / "grown", 12, arch, **settings)

    assert (after.step, after.rates, after.decays) == (8, before.rates, before.decays)
    assert trainer.state.global_step == 12
    names = renames(before.moments, grown.plan, family_of(small.model))
    assert len(after.moments) == sum(map(len, names.values()))
    for old, (own, *new) in names.items():
        assert torch.equal(after.weights[own], before.weights[old])
        assert after.moments[own].keys() == before.moments[old].keys()
        for key, value in before.moments[old].items():
            assert equal(after.moments[own][key], value), (own, key)
            for name in new:
                fresh = after.moments[name][key]
                assert not (fresh.any() if isinstance(fresh, torch.Tensor) else fresh), (name, key)
    rates = {row["step"]: row["learning_rate"] for row in small.state.log_history if "learning_rate" in row}
    assert {r["step"]: r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r} == rates
    moved = [name for name, tensor in after.trained.items() if not torch.equal(tensor, after.weights[name])]
    assert set(moved) == set(after.weights), "a tensor was not trained"


def test_moments_can_be_copied_or_dropped(trainer_run: Path, tmp_path: Path) -> None:
    checkpoint = trainer_run / "checkpoint-8"
    _, before = resumed(tmp_path / "again", checkpoint, 6)
    copied = GrowthConfig(init="copy", placement="stack", moments="copy")
    grown = grow_checkpoint(checkpoint, tmp_path / "copied", to_layers=18, growth=copied)
    _, after = resumed(tmp_path / "large", tmp_path / "copied", 18)
    for old, new in renames(before.moments, grown.plan, family_of("llama")).items():
        for name in new:
            assert all(equal(after.moments[name][k], v) for k, v in before.moments[old].items())
    saved = torch.load(tmp_path / "copied" / "optimizer.pt", weights_only=True)["state"]
    storages = [t.untyped_storage().data_ptr() for entry in saved.values() for t in entry.values() if t.ndim]
    assert len(set(storages)) == len(storages), "two parameters share their moments"

    dropped = GrowthConfig(init="copy", placement="stack", moments="reset")
    grow_checkpoint(checkpoint, tmp_path / "dropped", to_layers=12, growth=dropped)
    _, after = resumed(tmp_path / "third", tmp_path / "dropped", 12)
    assert (after.moments, after.rates, after.step) == ({}, before.rates, 8)


def test_files_that_do_not_depend_on_the_depth_are_copied_unopened(trainer_run: Path, tmp_path: Path) -> None:
    shutil.copytree(trainer_run / "checkpoint-4", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "training_args.bin").write_bytes(b"not even a pickle")
    grow_checkpoint(tmp_path / "ckpt", tmp_path / "grown", to_layers=8, growth=COPY)
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "ckpt" / name).read_bytes()
    assert not list((tmp_path / "grown").glob(".*"))


def test_named_groups_of_ones_own_go_by_name(trainer_run: Path, tmp_path: Path) -> None:
    shutil.copytree(trainer_run / "checkpoint-4", tmp_path / "ckpt")
    model = tiny_model("llama", 6, dropout=0.0)
    named = list(model.named_parameters())[::-1]
    groups = [{"params": named[:5], "lr": 0.1}, {"params": named[5:], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups)
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "ckpt" / "optimizer.pt")
    grown = grow_checkpoint(tmp_path / "ckpt", tmp_path / "grown", to_layers=7, growth=COPY)
    saved = torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True)
    names = renames([name for name, _ in named], grown.plan, family_of("llama"))
    for group, old in zip(saved["param_groups"], (named[:5], named[5:]), strict=True):
        assert group["param_names"] == [new for name, _ in old for new in names[name]]
    order = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert [place for group in saved["param_groups"] for place in group["params"]] == list(range(len(order)))
    old_moments = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in named}
    for name, (own, *_) in names.items():
        assert torch.equal(saved["state"][order.index(own)]["exp_avg"], old_moments[name])


def refused(checkpoint: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        grow_checkpoint(checkpoint, tmp_path / "grown", to_layers=8, growth=COPY)
    assert not (tmp_path / "grown").exists()
    assert not list(tmp_path.glob(".*"))


Spoil = Callable[[Path, dict[str, Any]], Any]
SPOILED: dict[str, tuple[Spoil, str]] = {
    "frozen": (lambda path, old: _without_last(old), "groups of .* a Trainer makes"),
    "another model": (lambda path, old: _swapped(old), "its moments would go to other parameters"),
    "no optimizer": (lambda path, old: {"weights": 1}, "is no optimizer's state"),
}


def _without_last(old: dict[str, Any]) -> dict[str, Any]:
    old["param_groups"][0]["params"].pop()
    return old


def _swapped(old: dict[str, Any]) -> dict[str, Any]:
    embedding, query = old["state"][0], old["state"][1]
    assert embedding["exp_avg"].shape != query["exp_avg"].shape
    return old | {"state": {**old["state"], 0: query, 1: embedding}}


@pytest.mark.parametrize("name", SPOILED)
def test_an_optimizer_that_is_not_this_models(name: str, trainer_run: Path, tmp_path: Path) -> None:
    spoil, match = SPOILED[name]
    path = tmp_path / "ckpt" / "optimizer.pt"
    shutil.copytree(trainer_run / "checkpoint-4", tmp_path / "ckpt")
    torch.save(spoil(path, torch.load(path, weights_only=True)), path)
    refused(tmp_path / "ckpt", tmp_path, match)


def test_an_optimizer_file_that_would_run_code(trainer_run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "MARKER"
    prove(marker)
    shutil.copytree(trainer_run / "checkpoint-4", tmp_path / "ckpt")
    torch.save({"state": Payload(marker), "param_groups": []}, tmp_path / "ckpt" / "optimizer.pt")
    refused(
        tmp_path / "ckpt", tmp_path, "could run code and is not read: remove it to grow the weights alone"
    )
    assert not marker.exists()
    (tmp_path / "ckpt" / "optimizer.pt").unlink()
    alone = grow_checkpoint(tmp_path / "ckpt", tmp_path / "grown", to_layers=8, growth=COPY)
    assert not alone.has_optimizer
    # Without its optimizer a Trainer would start a fresh one at the old step: there is no way back to that.
    assert not (tmp_path / "grown" / "trainer_state.json").exists()


def test_a_position_means_another_parameter_in_a_deeper_model(trainer_run: Path, tmp_path: Path) -> None:
    """The failure that the mapping prevents: positions of 6 layers, read in a model of 12."""
    shutil.copytree(trainer_run / "checkpoint-8", tmp_path / "naive")
    tiny_model("llama", 12).save_pretrained(tmp_path / "naive")
    with pytest.raises(ValueError, match="doesn't match the size"):
        resumed(tmp_path / "run", tmp_path / "naive", 12)


def test_gradients_reach_new_layers_at_the_first_step(trainer_run: Path, tmp_path: Path) -> None:
    grow_checkpoint(trainer_run / "checkpoint-8", tmp_path / "grown", to_layers=12, growth=COPY)
    seen: dict[str, bool] = {}

    def look(model: Any, optimizer: Any) -> None:
        seen.update({n: bool(optimizer.state[p]["exp_avg"].any()) for n, p in model.named_parameters()})

    model = tiny_model("llama", 12, dropout=0.0)
    trainer = tiny_trainer(tmp_path / "x", model, max_steps=12, save_steps=4, callbacks=[AtStep(9, look)])
    trainer.train(resume_from_checkpoint=str(tmp_path / "grown"))
    assert len(seen) == len(list(model.named_parameters()))
    assert all(seen.values())
