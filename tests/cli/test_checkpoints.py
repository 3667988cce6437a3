"""`aiether grow` and `aiether inspect`: what they print and write, and their exit status."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.integrations.tiny import tiny_model
from transformers import AutoModelForCausalLM

from aiether.cli import main
from aiether.cli._progress import bytes_progress
from aiether.integrations.offline import _write


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three checkpoints of a 2-layer model, steps 1000 to 3000."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", 2)
    for step in (1000, 2000, 3000):
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(step + number)
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(f"ckpt-{step}")
    return tmp_path


def test_inspect_prints_a_table_and_writes_page_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "ckpt-1000", "ckpt-2000", "ckpt-3000", "--output", "geometry.html"]) == 0
    said = capsys.readouterr().out
    assert "ckpt-1000 → ckpt-2000 → ckpt-3000" in said
    assert "One checkpoint every 1,000 steps." in said
    numbers = json.loads(Path("geometry.json").read_text())
    rows = {line.split("  ")[0].strip(): line for line in said.splitlines()}
    assert f"{numbers['layers'][1]['tau']:.3g}" in rows["layer 1"]
    assert f"{numbers['model']['displacement']:.3g}" in rows["all tensors"]
    assert f"ρ ≥ {2 / 3:.2f}" in said
    assert "up_proj" not in said
    page = Path("geometry.html").read_text()
    assert page.count("<figure") == 4
    assert "<script" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page), "the page loads something"
    assert f"{numbers['layers'][1]['kappa']:.3g}" in page
    assert "mlp.up_proj.weight" in page


def test_inspect_shows_every_tensor_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["inspect", "ckpt-1000", "ckpt-2000", "ckpt-3000", "--per-tensor", "--output", "numbers.json"])
        == 0
    )
    assert capsys.readouterr().out.count("mlp.up_proj") == 2
    assert json.loads(Path("numbers.json").read_text())["model"]["num_snapshots"] == 3
    assert not Path("numbers.html").exists()


def test_names_from_files_are_text_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<script>alert(1)</script>"
    for number in range(3):
        Path(f"{number}<b>[red]").mkdir()
        tensors = {f"layers.{i}.{hostile}": torch.randn(3) for i in range(2)}
        save_file(tensors, f"{number}<b>[red]/model.safetensors")
    assert main(["inspect", *(f"{number}<b>[red]" for number in range(3)), "--output", "page.html"]) == 0
    assert "0<b>[red]" in capsys.readouterr().out
    page = Path("page.html").read_text()
    assert hostile not in page
    assert "<b>[red]" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("spelling", ["--to_layers 4 --output_dir", "--to-layers 4 --output-dir"])
def test_grow_with_a_history(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"grow ckpt-3000 {spelling} grown/ --init geometric --history ckpt-1000 ckpt-2000"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "2 -> 4 layers (stack, geometric): 0 1 +0 +1" in said
    old, new = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("ckpt-3000", "grown"))
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    change = new["model.layers.2.mlp.up_proj.weight"] - old["model.layers.0.mlp.up_proj.weight"]
    assert float(change.norm()) > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("grow ckpt-3000 --to_layers 4", "--output_dir is missing"),
        ("grow ckpt-3000 --output_dir x", "--to_layers is missing"),
        (
            "grow ckpt-3000 --to_layer 4 --output_dir x",
            "unknown flag '--to_layer'; did you mean '--to_layers'",
        ),
        ("grow ckpt-3000 --to_layers four --output_dir x", "--to_layers is 'four': a whole number"),
        ("grow ckpt-3000 --to_layers 2 --output_dir x", "the model has 2 layers already"),
        ("grow ckpt-3000 --to_layers 4 --output_dir ckpt-1000", "exists already: name a new folder"),
        ("grow ckpt-3000 --to_layers 4 --output_dir x --init magic", "--init is 'magic'"),
        ("grow ckpt-3000 --to_layers 4 --output_dir x --init geometric", "at least 3 checkpoints"),
        ("grow ckpt-3000 --to_layers 4 --output_dir x --noise -1 --init noise", "noise is -1.0"),
        ("grow none --to_layers 4 --output_dir x", "'none' is not a folder"),
        ("grow a b --to_layers 4 --output_dir x", "unexpected 'b'"),
        ("grow", "expected aiether grow CHECKPOINT"),
        ("inspect", "at least 3 are needed"),
        ("inspect ckpt-1000 ckpt-2000", "2 checkpoint(s) found: at least 3 are needed"),
        ("inspect ckpt-1000 ckpt-2000 none", "'none' is not a folder"),
        ("inspect ckpt-1000 ckpt-2000 ckpt-3000 --output page.pdf", "name a .html or .json file"),
        ("inspect ckpt-1000 ckpt-2000 ckpt-3000 --output none/page.html", "in a folder that exists"),
        ("inspect ckpt-1000 ckpt-2000 ckpt-3000 --outptu x", "unknown flag '--outptu'"),
    ],
)
def test_mistakes(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(Path().rglob("*")) == before, "it left something"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half_folder(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = _write.SafetensorsWriter.write

    def interrupted(self: _write.SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(_write.SafetensorsWriter, "write", interrupted)
    before = sorted(Path().rglob("*"))
    assert main(["grow", "ckpt-3000", "--to_layers", "4", "--output_dir", "grown"]) == status
    assert f"interrupted by {number.name}" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("command", ["grow", "inspect"])
def test_help_names_the_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert ("--history" if command == "grow" else "--per_tensor") in capsys.readouterr().out


def test_progress_in_plain_lines_says_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("aiether.cli._progress.time.monotonic", lambda: now)
    report: Callable[[int, int], None]
    with bytes_progress("growing") as report:
        report(1, 100)
        now = 120.0
        report(25, 100)
        now = 121.0
        report(26, 100)
    assert capsys.readouterr().err == "growing: 25 %, about 60 s left\n"
