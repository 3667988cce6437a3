"""`aiether halting`: a new folder, in which the head alone is new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.adaptive.models import VOCAB, lahr

from aiether.cli import main

HEAD = {"model.latent.halt_weight", "model.latent.halt_bias"}
WINDOWS, LENGTH = 40, 16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Tokens in windows of 16; `aiether halting` holds out the last four."""
    ids = np.random.default_rng(0).integers(1, VOCAB, WINDOWS * LENGTH).astype(np.uint16)
    ids.tofile(tmp_path / "text.bin")
    return tmp_path / "text.bin"


def finished(folder: Path, **settings: Any) -> Any:
    """The final model of a run."""
    model = lahr(**{"condition": "no_memory", **settings})
    model.save_pretrained(folder / "final")
    return model


def words(text: Path, *more: str) -> list[str]:
    return ["--dataset_path", str(text), "--context_length", str(LENGTH), "--device", "cpu", *more]


@pytest.mark.parametrize(("halting", "dtype"), [("fixed", "float32"), ("learned", "bfloat16")])
def test_a_head_is_taught_and_nothing_else_moves(
    halting: str, dtype: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = finished(run, halting=halting).to(getattr(torch, dtype))
    model.save_pretrained(run / "final")
    before = {file: file.read_bytes() for file in (run / "final").iterdir()}
    teach = ["halting", str(run), *words(text, "--batches", "30", "--batch_size", "4", "--lr", "0.1")]
    assert main(teach) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [[float(cell) for cell in line.split()] for line in lines[3:]]
    assert [row[0] for row in table] == [0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1]
    iterations = [row[2] for row in table]
    assert iterations == sorted(iterations)
    assert (iterations[0], iterations[-1]) == (1, 3)
    assert len(set(iterations)) > 3  # the head tells tokens apart
    first, last = (float(each) for each in lines[0].rpartition("cross-entropy ")[2].split(" -> "))
    assert last < first

    new = tmp_path / "run-halting"
    was, now = (load_file(folder / "model.safetensors") for folder in (run / "final", new))
    assert set(now) == set(was) | HEAD
    loaded = {  # routers are kept in single precision
        name: tensor.float() if ".routing." in name and tensor.is_floating_point() else tensor
        for name, tensor in was.items()
    }
    assert {name: now[name].dtype for name in was} == {name: each.dtype for name, each in loaded.items()}
    assert all(torch.equal(loaded[name], now[name]) for name in set(was) - HEAD)
    assert any(now[name].any() for name in HEAD)
    assert {file: file.read_bytes() for file in (run / "final").iterdir()} == before

    # On the windows that were held out the folder does what the table says; thinking always to the end, it is
    # the model that it was.
    end = tmp_path / "end.bin"
    np.fromfile(text, np.uint16)[-4 * LENGTH :].tofile(end)
    for folder, q, row in ((new, 0.5, table[2]), (new, 1.0, table[-1]), (run, 1.0, table[-1])):
        asked = ["--halt_q", str(q)] if folder == new or halting == "learned" else []
        assert main(["evaluate", str(folder), *words(end, "--json"), *asked]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(row[1], abs=1e-4)
        assert found["extra"]["iterations"] == pytest.approx(row[2], abs=0.006)
    assert main(teach) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "more", "told"),
    [
        ({"condition": "mod_only"}, [], "no latent block"),
        ({"iterations": 1}, [], "--lahr.iterations 2 or more"),
        ({}, ["--batch_size", "37"], "40 windows of 16 tokens"),
        ({}, ["--tau", "-1"], "tau is -1"),
    ],
    ids=["no latent block", "one iteration", "too little text", "tau"],
)
def test_what_cannot_be_taught_is_one_line_and_leaves_nothing(
    settings: dict[str, Any],
    more: list[str],
    told: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished(tmp_path / "run", **settings)
    capsys.readouterr()
    assert main(["halting", str(tmp_path / "run"), *words(text, *more)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "text.bin"}
