"""Folders of decoders with routed layers, in a process that has not made one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aiether.adaptive import add_mixture_of_depths, decoders
from aiether.adaptive.routing import Routing
from aiether.cli import main
from aiether.data.tokenizer import load_tokenizer, train_tokenizer

TEXT = " ".join(f"w{number % 7}{number % 3}" for number in range(90))
KIND = "llama_mixture_of_depths"


@pytest.fixture
def routed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A routed Llama whose routers matter, saved with a tokenizer; its type is unknown again afterwards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = add_mixture_of_depths(LlamaForCausalLM(config), capacity=0.25, burst=2).eval()
    for module in model.modules():
        if isinstance(module, Routing):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    train_tokenizer([TEXT], 280).save(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(decoders, "_routed_classes", cache(decoders._routed_classes.__wrapped__))
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, KIND)  # type: ignore[attr-defined]
    return model


def test_commands_load_the_folder_of_a_converted_decoder(
    routed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = str(tmp_path / "model"), tmp_path / "valid.txt"
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode([TEXT])[0][:32]])
    text.write_text(TEXT)
    words = ["--dataset_path", str(text), "--cache_dir", str(tmp_path / "cache"), "--windows", "1"]
    assert main(["evaluate", folder, *words, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        logits = routed(input_ids=ids, use_cache=False).logits
        plain = LlamaForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert not torch.allclose(plain, logits, atol=1e-2)  # the routers matter

    assert main(["generate", folder, "w00 w11", "--max_new_tokens", "6", "--temperature", "0"]) == 0
    prompt = torch.tensor([tokenizer.encode(["w00 w11"])[0]])
    grown = routed.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = tokenizer.backend.decode(grown[0, prompt.shape[1] :].tolist())
    assert capsys.readouterr().out == f"w00 w11{written}\n"

    assert main(["evaluate", "--conformance", folder, "--context_length", "16", "--device", "cpu"]) == 0
    assert "failed" not in capsys.readouterr().out
