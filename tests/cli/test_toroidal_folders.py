"""Folders of retrofitted decoders, whole and as differences, in a process that has not made one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import aiether
from aiether.cli import main
from aiether.data.tokenizer import load_tokenizer, train_tokenizer
from aiether.toroidal import decoders, set_progress, torus_terms

LINES = [" ".join(f"w{number % 7}{number % 3}" for number in range(start, start + 30)) for start in range(4)]
TEXT = "\n".join(LINES)
CONTEXT = 24


def config(vocab_size: int = 280) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A base with a tokenizer and what was made of it, saved both ways; its type is unknown again."""
    torch.manual_seed(0)
    train_tokenizer([TEXT], 280).save(tmp_path / "base")
    LlamaForCausalLM(config()).save_pretrained(tmp_path / "base")
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    aiether.retrofit(model, layers=[1], platters=2, period=16, lambda_distance=8.0)
    set_progress(model, 1.0)
    with torch.no_grad():
        for terms in torus_terms(model):
            for parameter in terms.parameters():
                parameter.normal_(std=0.5)
    model.save_pretrained(tmp_path / "differences")
    model.save_pretrained(tmp_path / "whole", whole=True)
    (tmp_path / "valid.txt").write_text(TEXT)
    monkeypatch.setattr(decoders, "_toroidal_classes", cache(decoders._toroidal_classes.__wrapped__))
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llama_toroidal")  # type: ignore[attr-defined]
    words = ["--dataset_path", str(tmp_path / "valid.txt"), "--device", "cpu"]
    cached = ["--cache_dir", str(tmp_path / "cache")]
    return {"model": model.eval(), "root": tmp_path, "words": words, "cached": cached}


@pytest.mark.parametrize("way", ["differences", "whole"])
def test_commands_load_the_folder_of_a_retrofitted_decoder(
    folders: dict[str, Any], way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, model = folders["root"], folders["model"]
    folder, base = str(root / way), str(root / "base")
    spoken = [] if way == "differences" else ["--tokenizer", base]
    words = [*folders["words"], *folders["cached"], *spoken]
    assert main(["evaluate", folder, *words, "--against", base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    ids = torch.tensor([*load_tokenizer(base).encode([TEXT])[0], load_tokenizer(base).eos_token_id])
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        logs, base_logs = (
            each(input_ids=rows, use_cache=False).logits.double()[:, :-1].log_softmax(-1)
            for each in (model, LlamaForCausalLM.from_pretrained(base))
        )
    losses, base_losses = (-each.gather(-1, rows[:, 1:, None])[..., 0] for each in (logs, base_logs))
    kl = (base_logs.exp() * (base_logs - logs)).sum(-1)
    beside = found["against"]
    assert kl.mean() > 0.01  # the torus matters
    assert found["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert found["buckets"][0]["perplexity"] == pytest.approx(float(losses[:, 0].mean().exp()), rel=1e-4)
    assert beside["loss"] == pytest.approx(float(base_losses.mean()), abs=1e-5)
    assert beside["kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
    gains = (losses - base_losses).mean(1)
    assert beside["loss_difference"] == pytest.approx(float(gains.mean()), abs=1e-5)
    assert beside["standard_error"] == pytest.approx(float(gains.std()) / len(gains) ** 0.5, rel=1e-3)
    assert found["decode_parity"]["tokens"] == CONTEXT
    assert found["decode_parity"]["difference"] < 1e-5 * max(1.0, found["decode_parity"]["scale"])

    assert main(["generate", folder, "w00 w11", "--max_new_tokens", "6", "--temperature", "0", *spoken]) == 0
    prompt = torch.tensor([load_tokenizer(base).encode(["w00 w11"])[0]])
    grown = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = load_tokenizer(base).backend.decode(grown[0, prompt.shape[1] :].tolist())
    assert capsys.readouterr().out == f"w00 w11{written}\n"

    assert main(["evaluate", "--conformance", folder, "--context_length", "8", "--device", "cpu"]) == 0
    assert "failed" not in capsys.readouterr().out


def test_what_is_printed_names_the_base_and_what_was_not_measured(
    folders: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(folders["root"] / "base")
    words = [*folders["words"], *folders["cached"], "--against", base, "--parity_tokens", "0"]
    assert main(["evaluate", base, *words]) == 0
    shown = capsys.readouterr().out
    for part in (
        "+0.0000 nats per token, ± 0.0000",
        "0 nats per token, D(base || model)",
        "not counted on cpu",
    ):
        assert part in shown
    assert "decode parity" not in shown


def test_the_legacy_arithmetic_cannot_be_mistaken(
    folders: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folders["root"] / "differences")
    words = [*folders["words"], "--legacy", "--context_length", "20", "--windows", "3"]
    assert main(["evaluate", folder, *words, "--json"]) == 0
    single = json.loads(capsys.readouterr().out)
    assert main(["evaluate", folder, *words, "--double_shift"]) == 0
    double = capsys.readouterr().out
    assert single["lines"] == 3
    assert not {"loss", "perplexity"} & single.keys()
    assert double.startswith("legacy arithmetic: padding counted, lines cut or padded to 20 tokens, labels")
    assert "not a perplexity\n" in double
    assert f"{single['legacy_loss']:.4f}" not in double


def test_a_base_that_cannot_be_compared_is_refused(
    folders: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root, words = folders["root"], [*folders["words"], *folders["cached"]]
    LlamaForCausalLM(config(vocab_size=300)).save_pretrained(root / "wide")
    train_tokenizer([TEXT.replace("w", "v")], 280).save(root / "other")
    LlamaForCausalLM(config()).save_pretrained(root / "other")
    capsys.readouterr()
    for name, told in (
        ("wide", "has 280 entries"),
        ("other", "is not the model's"),
        ("no where", "is not a folder"),
    ):
        assert main(["evaluate", str(root / "differences"), *words, "--against", str(root / name)]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert said.count("\n") == 1


def test_damaged_differences_are_one_line(
    folders: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders["root"]
    record = root / "differences" / "toroidal.json"
    stored = json.loads(record.read_text())
    for change, told in (
        ({"base": str(root / "gone")}, "cannot be loaded"),
        ({"base": str(root / "differences")}, "has no config.json"),
        ({"base": 3}, "names no base"),
        ({"fingerprint": "0"}, "another fingerprint"),
    ):
        record.write_text(json.dumps({**stored, **change}))
        assert main(["evaluate", "--conformance", str(root / "differences"), "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--double_shift",), "give --legacy too"),
        (("--legacy", "--stride", "3"), "--stride has no meaning"),
        (("--legacy",), "reads the lines of one text file"),
        (("--conformance", "--against", "x"), "--against is about a text"),
        (("--parity_tokens", "-1"), "parity_tokens is -1"),
    ],
    ids=str,
)
def test_flags_that_mean_nothing_together_are_refused(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "anywhere", *words]) == 2
    assert told in capsys.readouterr().err
