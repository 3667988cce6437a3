from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from aiether.cli import main
from aiether.data.tokenizer import train_tokenizer


def model(folder: Path, *, causal: bool) -> str:
    """A Bert with a head, which reads to the left only if it is told that it is a decoder."""
    config = BertConfig(
        vocab_size=280,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        is_decoder=causal,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    BertLMHeadModel(config).save_pretrained(folder)
    return str(folder)


def test_conformance_prints_a_table_and_exits_with_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = model(tmp_path / "good", causal=True), model(tmp_path / "bad", causal=False)
    assert main(["evaluate", "--conformance", good, "--context_length", "16"]) == 0
    shown = capsys.readouterr().out
    assert "later tokens" in shown
    assert "failed" not in shown
    assert main(["evaluate", bad, "--conformance", "--json"]) == 1
    stored = json.loads(capsys.readouterr().out)
    assert stored["passed"] is False
    statuses = {check["name"]: check["status"] for check in stored["checks"]}
    assert statuses["later tokens"] == statuses["shorter input"] == "failed"
    assert statuses["row in a batch"] == "passed"


def test_evaluate_prints_lines_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "model", causal=True)
    texts = [
        " ".join(f"w{number % 7}{number % 3}" for number in range(start, start + 60)) for start in range(9)
    ]
    train_tokenizer(texts, 280).save(tmp_path / "tokenizer")
    (tmp_path / "valid.txt").write_text("\n<|endoftext|>\n".join(texts))
    words = ["--dataset_path", str(tmp_path / "valid.txt"), "--tokenizer", str(tmp_path / "tokenizer")]
    words += ["--cache_dir", str(tmp_path / "cache"), "--device", "cpu", "--windows", "2"]
    assert main(["evaluate", folder, *words]) == 0
    lines = capsys.readouterr().out
    assert main(["evaluate", folder, *words, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert f"{stored['loss']:.4f} nats per token" in lines
    assert (stored["windows"], stored["context_length"], stored["stride"]) == (2, 32, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("missing",), "is not a folder"),
        (("--conformance", "missing"), "is not a folder"),
        (("model", "--conformance", "--stride", "3"), "--stride is about a text"),
        (("model",), "give --dataset_path"),
        (("model", "--conformance", "--context_length", "40"), "length is 40; allowed is 8 to 32"),
        (("model", "--batchsize", "3"), "did you mean '--batch_size'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "model", causal=True)
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
