from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiether.cli._settings import GROUPS, flag_name
from aiether.cli.train import SourceFlags, read_settings, read_source, train
from aiether.training.config import PRESETS, TrainConfig, setting_types

DOCUMENTED: dict[str, tuple[Any, str, Any]] = {
    # The reference's three tables: documented default, another value as typed, and as read.
    "beta0": (0.1, "0.12", 0.12),
    "gamma0": (0.15, "0.18", 0.18),
    "eta0": (0.03, "0.04", 0.04),
    "k_subspace": (10, "15", 15),
    "ell_orth": (5, "7", 7),
    "n_layer": (6, "12", 12),
    "n_head": (6, "12", 12),
    "n_embd": (384, "768", 768),
    "dropout": (0.1, "0.0", 0.0),
    "num_epochs": (3, "5", 5),
    "batch_size": (8, "16", 16),
    "lr": (5e-4, "3e-4", 3e-4),
    "dataset_path": (None, "./data/text", "./data/text"),
    "pg_patience": (5, "3", 3),
    "pg_threshold": (0.15, "0.1", 0.1),
    "tau_crit": (2.0, "2.5", 2.5),
    "kappa_crit": (0.5, "0.7", 0.7),
    "warmup_steps": (400, "500", 500),
    "history_window_size": (15, "5", 5),
    "collect_interval_steps": (100, "50", 50),
}


def settings(*arguments: str, default_preset: str = "report") -> TrainConfig:
    return read_settings(arguments, read_source(arguments), default_preset=default_preset)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_flags_have_their_documented_default(name: str) -> None:
    assert getattr(settings(), name) == DOCUMENTED[name][0]


@pytest.mark.parametrize("spell", [lambda name: name, lambda name: name.replace("_", "-")], ids=["_", "-"])
def test_documented_flags_work_under_both_spellings(spell: Any) -> None:
    typed = [part for name, (_, text, _) in DOCUMENTED.items() for part in (f"--{spell(name)}", text)]
    joined = [f"--{spell(name)}={text}" for name, (_, text, _) in DOCUMENTED.items()]
    for arguments in (typed, joined):
        config = settings(*arguments)
        assert {name: getattr(config, name) for name in DOCUMENTED} == {
            name: value for name, (_, _, value) in DOCUMENTED.items()
        }


def test_every_setting_is_a_flag_with_help() -> None:
    grouped = [name for helps in GROUPS.values() for name in helps]
    assert sorted([*grouped, "preset"]) == sorted(setting_types())
    assert all(text.endswith(".") for helps in GROUPS.values() for text in helps.values())


def test_lists_switches_and_words_are_read() -> None:
    config = settings("--grow_to", "8", "12", "--bf16", "--center", "--no-center", "--k-subspace", "auto")
    assert config.grow_to == (8, 12)
    assert config.bf16
    assert not config.center
    assert config.k_subspace == "auto"


def test_the_command_and_the_entry_point_differ_in_their_preset() -> None:
    assert settings(default_preset="recommended").n_embd == PRESETS["recommended"]["n_embd"]
    assert settings("--preset", "large", default_preset="recommended").tau_crit == 2.75


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: aggressive\nlr: 1e-3\nn_layer: 4\n")
    config = settings("--config", str(file), "--lr", "2e-3", default_preset="recommended")
    assert (config.preset, config.lr, config.n_layer, config.tau_crit) == ("aggressive", 2e-3, 4, 1.8)


def test_a_flag_that_repeats_a_default_still_wins_over_the_preset() -> None:
    assert settings("--num_epochs", "3", "--preset", "recommended").max_steps is None


def test_a_file_may_need_the_flags_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("n_layer: 10\nmax_layers: 4\n")
    assert settings("--config", str(file), "--max_layers", "20").max_layers == 20


def test_values_outside_a_documented_range_are_said_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings("--beta0", "0.9").beta0 == 0.9
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "beta0 is 0.9, outside the documented range 0.05 to 0.5" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta_0", "1"], r"unknown flag '--beta_0'; did you mean '--beta0'\?"),
        (["--lr", "fast"], "--lr is 'fast': a number is meant"),
        (["--n-layer", "2.5"], "--n-layer is '2.5': a whole number is meant"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--trigger", "gut"], "--trigger is 'gut': one of geometric"),
        (["--grow_to", "4", "x"], "--grow_to is"),
        (["--bf16", "True"], "--bf16 takes no value"),
        (["book.txt"], "unexpected 'book.txt'"),
        (["--lr", "1e-3", "book.txt"], "unexpected 'book.txt' after --lr 1e-3"),
        (["--preset", "fast"], "unknown preset 'fast'"),
        (["--preset"], "--preset needs a value"),
        (["--config", "missing.yaml"], "missing.yaml' does not exist"),
        (["--n_head", "5"], "n_head"),
    ],
)
def test_what_cannot_be_read_is_explained_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        settings(*arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("flag", ["--preset", "--config"])
def test_resume_refuses_another_source_of_settings(flag: str) -> None:
    with pytest.raises(ValueError, match=f"remove {flag}"):
        train(["--resume", "runs/x", flag, "report"])


def test_resume_refuses_a_word_and_still_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"remove 'book\.txt'"):
        train(["book.txt", "--resume", "runs/x"])
    with pytest.raises(SystemExit) as stop:
        train(["--resume", "runs/x", "--help"])
    assert stop.value.code == 0
    assert "--resume RUN_DIR" in capsys.readouterr().out


def test_resume_and_train_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiether.training import run as job

    monkeypatch.setattr(job, "resume", lambda path, changes: ("resumed", path, changes))
    monkeypatch.setattr(job, "train", lambda config: ("trained", config))
    resumed: Any = train(["--lr", "1", "--resume", "runs/x", "--bf16"])
    assert resumed == ("resumed", Path("runs/x"), {"lr": 1.0, "bf16": True})
    trained: Any = train(["--lr", "1e-3"], default_preset="report")
    assert trained == ("trained", settings("--lr", "1e-3"))


def test_the_help_shows_every_flag_and_the_presets_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        settings("--help", default_preset="conservative")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in (*setting_types(), *SourceFlags.__dataclass_fields__):
        assert f"--{flag_name(name)}" in shown
    assert "(default: 0.08)" in shown
