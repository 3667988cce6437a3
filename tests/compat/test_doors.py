"""The reference's documented imports and calls, as its README writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aiether.cli.train import read_settings, read_source
from aiether.training import run as job
from aiether.training import train_with_hf_trainer
from aiether.training.config import TrainConfig

EXAMPLES: dict[str, str] = {
    "minimal": "--beta0 0.1 --gamma0 0.15 --eta0 0.03 --k_subspace 10 --ell_orth 5",
    "complete": "--n_layer 6 --n_head 6 --n_embd 384 --num_epochs 3 --batch_size 8 --lr 5e-4 "
    "--dataset_path /path/to/dataset --beta0 0.1 --gamma0 0.15 --eta0 0.03 --k_subspace 10 --ell_orth 5",
    "gpt2": "--n_layer 12 --n_head 12 --n_embd 768 --dataset_path ./data/fineweb_edu --num_epochs 5 "
    "--batch_size 16 --lr 3e-4 --beta0 0.12 --gamma0 0.18 --eta0 0.04 --k_subspace 15 --ell_orth 7",
    "conservative": "--beta0 0.08 --gamma0 0.12 --eta0 0.02 --k_subspace 8 --ell_orth 4 --tau_crit 2.5 "
    "--kappa_crit 0.7 --pg_patience 5",
    "aggressive": "--beta0 0.15 --gamma0 0.20 --eta0 0.05 --k_subspace 12 --ell_orth 6 --tau_crit 1.8 "
    "--kappa_crit 0.4 --pg_patience 3",
    "ablation": "--beta0 0.15 --gamma0 0.0 --eta0 0.0 --k_subspace 10 --ell_orth 5",
}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that reach the job, which is not run."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr(job, "train", configs.append)
    return configs


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documented_command_lines_reach_the_job(name: str, trained: list[TrainConfig]) -> None:
    words = EXAMPLES[name].split()
    train_with_hf_trainer(words)
    [config] = trained
    assert config.preset == "report"
    for flag, text in zip(words[::2], words[1::2], strict=True):
        value = getattr(config, flag.removeprefix("--"))
        assert value == (text if isinstance(value, str) else float(text))


def test_the_presets_are_the_documented_examples() -> None:
    for name in ("conservative", "aggressive"):
        words = ["--preset", "report", *EXAMPLES[name].split()]
        spelt = read_settings(words, read_source(words))
        preset = read_settings(["--preset", name], read_source(["--preset", name]))
        assert {**vars(spelt), "preset": name} == vars(preset)


def test_without_arguments_the_flags_are_the_processes_own(
    trained: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--tau-crit", "2.5"])
    train_with_hf_trainer()
    assert trained[0].tau_crit == 2.5


def test_a_flag_that_does_not_exist_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_with_hf_trainer(["--beta_0", "1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train: unknown flag '--beta_0'; did you mean '--beta0'?\n"


def test_the_training_package_has_no_other_lazy_names() -> None:
    import aiether.training as package

    absent: Any = "train_with_trainer"
    with pytest.raises(AttributeError, match=absent):
        getattr(package, absent)


def test_the_documented_layer_state_manager(tmp_path: Path) -> None:
    from aiether.managers import LayerStateManager

    manager = LayerStateManager(output_dir=str(tmp_path / "checkpoints"))
    state = {"weight": torch.arange(6.0).reshape(2, 3)}
    manager.save_state(layer_id=0, state_name="L0", state_dict=state, step=100)
    loaded, metadata = manager.load_state(0, "L0")
    assert torch.equal(loaded["weight"], state["weight"])
    assert metadata["step"] == 100


def test_the_documented_callback_takes_its_documented_arguments() -> None:
    from transformers import TrainerCallback

    from aiether.callbacks import ProceduralGrowthCallback

    callback = ProceduralGrowthCallback(
        patience=5,
        threshold=0.15,
        strategy="GeometricExtrapolator",
        warmup_steps=400,
        growth_params={"beta0": 0.1, "gamma0": 0.15, "eta0": 0.03, "k_subspace": 10, "ell_orth": 5},
    )
    assert isinstance(callback, TrainerCallback)
