"""`aiether retrofit`, and the reference's door to it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.families import FAMILY_TABLE
from transformers import AutoModelForCausalLM

import aiether
from aiether.cli import main
from aiether.compat import finetune_modern
from aiether.retrofitting import inputs, job
from aiether.retrofitting.inputs import RetrofitJob, load_base

DOOR = Path(__file__).parents[2] / "scripts" / "finetune_modern.py"
STEPS = [
    "--transfer_steps",
    "4",
    "--steps",
    "8",
    "--save_interval",
    "1",
    "--gradient_accumulation_steps",
    "2",
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    next(case for case in FAMILY_TABLE if case.name == "phi").build(depth=2).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    np.random.default_rng(0).integers(1, 32, 60 * 16).astype(np.uint16).tofile(tmp_path / "text.bin")
    return tmp_path / "text.bin"


def words(base: Path, text: Path, *more: str) -> list[str]:
    common = ["--dataset_path", str(text), "--context_length", "16", "--period", "16", "--device", "cpu"]
    return ["retrofit", str(base), *common, *more]


def test_a_model_is_converted_tuned_and_stored_as_what_differs(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in base.iterdir()}
    out = tmp_path / "torus"
    arguments = words(base, text, "--layers", "1", "--platters", "4", "--output_dir", str(out), *STEPS)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "layer 1: gate 0.50, lambda" in printed
    assert "held-out loss, 6 windows" in printed
    assert {file: file.read_bytes() for file in base.iterdir()} == before
    summary = json.loads((out / "retrofit.json").read_text())
    model: Any = aiether.load(out)
    assert model.config.toroidal["layers"] == summary["layers"] == [1]
    assert model.config.toroidal["progress"] == 1
    ids = torch.from_numpy(np.fromfile(text, np.uint16).astype(np.int64)).view(-1, 16)[-6:]
    with torch.no_grad():
        after = model.eval()(ids, labels=ids).loss.item()
        at_first = AutoModelForCausalLM.from_pretrained(base).eval()(ids, labels=ids).loss.item()
    assert summary["loss_after"] == pytest.approx(after, abs=1e-5)
    assert summary["loss_before"] == pytest.approx(at_first, abs=1e-5)
    assert len((out / "rows.jsonl").read_text().splitlines()) == 12
    assert main(arguments) == 2
    assert "holds a finished retrofit" in capsys.readouterr().err


def test_kernels_are_chosen_for_tuning_and_not_stored(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(base, text, "--layers", "1", *STEPS)
    assert main([*arguments, "--output_dir", str(tmp_path / "eager"), "--backend", "eager"]) == 0
    assert aiether.load(tmp_path / "eager").config.toroidal["backend"] == "auto"
    assert main([*arguments, "--output_dir", str(tmp_path / "cudnn"), "--backend", "cudnn"]) == 2
    assert "'cudnn' cannot compute this on cpu" in capsys.readouterr().err
    assert not (tmp_path / "cudnn").exists(), "and says so before it begins"
    suggested = ["--suggest_layers", "1", "--backend", "eager"]
    assert main(words(base, text, *suggested)) == 0


def test_of_a_run_its_final_model_is_taken(base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    base.rename(tmp_path / "run" / "final")
    job = RetrofitJob(model=str(tmp_path / "run"), dataset_path=str(text), output_dir=str(tmp_path / "torus"))
    assert load_base(job).config._name_or_path == job.weights == str(tmp_path / "run" / "final")


def test_killed_and_called_again_gives_the_same_file(base: Path, text: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = [*STEPS, "--steps", "60"]
    assert main(words(base, text, "--layers", "0", "--output_dir", str(whole), *steps)) == 0
    arguments = words(base, text, "--layers", "0", "--output_dir", str(killed), *steps)
    process = subprocess.Popen(
        [sys.executable, "-m", "aiether", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    state = killed / "state" / "state.json"
    while process.poll() is None and not (state.exists() and json.loads(state.read_text())["step"] >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before it had ended"
    assert not (killed / "retrofit.json").exists()
    assert main(arguments) == 0
    assert (killed / "toroidal.safetensors").read_bytes() == (whole / "toroidal.safetensors").read_bytes()
    assert (killed / "rows.jsonl").read_text() == (whole / "rows.jsonl").read_text()
    assert not state.exists()


def test_layers_are_compared_and_chosen(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(base, text, "--suggest_layers", "1")) == 0
    *rows, last = capsys.readouterr().out.strip().splitlines()
    costs = {int(layer): float(cost) for layer, cost in (row.split() for row in rows[1:])}
    chosen = min(costs, key=costs.__getitem__)
    assert last == f"cheapest: --layers {chosen}"
    out = tmp_path / "torus"
    assert main(words(base, text, "--suggest_layers", "1", "--output_dir", str(out), "--steps", "1")) == 0
    assert json.loads((out / "retrofit.json").read_text())["layers"] == [chosen]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), "--output_dir is missing"),
        (("--output_dir", "x"), "no layers are named"),
        (("--output_dir", "x", "--layers", "7"), "name each of some from 0 to 1 once"),
        (("--output_dir", "x", "--layers", "0", "--platters", "3"), "does not divide"),
        (("--output_dir", "x", "--layers", "0", "--train_size", "60"), "the text has 60 windows"),
        (("--suggest_layers", "5"), "from 1 to 2"),
        (("--output_dir", "x", "--layers", "0", "--suggest_layers", "1"), "are both given"),
        (("--output_dir", "x", "--layers", "0", "--steps", "0", "--transfer_steps", "0"), "are both 0"),
        (("--output_dir", "text.bin", "--layers", "0"), "which is a file"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_model(
    more: tuple[str, ...],
    named: str,
    base: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words(base, text, *more)) == 2
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("aiether retrofit:")]) == 1
    assert named in told[-1]
    assert not (tmp_path / "x" / "toroidal.json").exists()


@pytest.mark.parametrize("name", ["nowhere", "no/where", "no/such/place"])
def test_a_model_that_is_not_there_is_named(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inputs, "no_answer", lambda name, kind: OSError("no network"))
    out = ["--layers", "0", "--output_dir", str(tmp_path / "x")]
    assert main(words(Path(name), text, *out)) == 2
    assert f"'{name}' is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("trust", [False, True])
def test_a_model_is_never_overwritten_and_told_so_before_anything_is_read(
    trust: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {path.name: path.read_bytes() for path in base.iterdir()}
    for model, out in ((base, base), (base.parent / "other", base)):
        shutil.copytree(base, base.parent / "other", dirs_exist_ok=True)
        more = ["--trust_remote_code"] if trust else []
        asked = words(model, tmp_path / "none.txt", "--layers", "0", "--output_dir", str(out), *more)
        assert main(asked) == 2
        assert "would be overwritten: choose another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.iterdir()} == held


def test_bfloat16_of_a_float16_model_is_refused_before_anything_is_read(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(tmp_path / "half")
    out = ["--layers", "0", "--output_dir", str(tmp_path / "x"), "--bf16"]
    assert main(words(tmp_path / "half", text, *out)) == 2
    assert "cannot compute in bfloat16" in capsys.readouterr().err
    asked = [
        "evaluate",
        str(tmp_path / "half"),
        "--dataset_path",
        str(text),
        "--context_length",
        "16",
        "--bf16",
    ]
    assert main([*asked, "--device", "cpu"]) == 2
    assert "cannot compute in bfloat16" in capsys.readouterr().err


def test_killed_after_its_last_file_it_is_finished(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = shutil.rmtree
    monkeypatch.setattr(
        job.shutil, "rmtree", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    out = ["--layers", "0", "--output_dir", str(tmp_path / "x"), *STEPS]
    main(words(base, text, *out))
    monkeypatch.setattr(job.shutil, "rmtree", kept)
    assert (tmp_path / "x" / "retrofit.json").is_file()
    assert main(words(base, text, *out)) == 2  # it holds a finished one


NUMBERS = {
    "val_size": ("0", "-3"),
    "train_size": ("0",),
    "epochs": ("-1", "inf"),
    "context_length": ("1",),
    "suggest_layers": ("0",),
    "lambda_distance": ("nan",),
    "cross": ("inf",),
    "ramp": ("nan",),
    "gradient_accumulation_steps": ("0",),
    "seed": ("-1",),
}
DOOR_NUMBERS = {
    "depth": ("0",),
    "lambda_distance": ("-1",),
    "max_length": ("1",),
    "train_size": ("0",),
    "val_size": ("0",),
    "epochs": ("-1",),
    "learning_rate": ("inf",),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in NUMBERS.items() for v in values])
def test_numbers_that_cannot_be_are_named_before_anything_is_read(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dataset_path", "none.txt", "--output_dir", "out"]
    assert main(["retrofit", str(tmp_path), *where, f"--{name}", value]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"aiether retrofit: {name} is {value}")
    assert told.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in DOOR_NUMBERS.items() for v in values])
def test_the_references_door_names_its_own_flags(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune_modern.main(["--model_name", str(tmp_path), f"--{name}", value]) == 2
    assert capsys.readouterr().err.startswith(f"finetune_modern.py: {name} is {value}")


def test_the_references_door(
    base: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "door"
    flags = {
        "model_name": base, "dataset_path": text, "layer_indices": "0,1", "depth": 2, "lambda_distance": 0.1,
        "fusion_mode": "mean", "train_size": 32, "val_size": 8, "epochs": 2, "output_dir": out,
        "max_length": 16, "device": "cpu",
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(DOOR), *arguments, "--use_checkpoint"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(DOOR), run_name="__main__")
    assert stop.value.code == 0
    held = aiether.load(out).config.toroidal
    assert (held["layers"], held["platters"], held["fusion_mode"]) == ([0, 1], 2, "mean")
    assert held["lambda_distance"] == 0.1
    assert "layer 1: gate 0.50, lambda" in capsys.readouterr().out
    assert len((out / "rows.jsonl").read_text().splitlines()) == 2 * 32 // 16
