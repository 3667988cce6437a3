"""Where a base model comes from, and a cache that fails: what a user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import FAMILY_TABLE

from aiether.evaluation import decode_parity
from aiether.training import evaluate as evaluating
from aiether.training.against import base_folder

LLAMA = next(case for case in FAMILY_TABLE if case.name == "llama")


def test_a_name_on_the_hub_is_downloaded_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LLAMA.build(depth=1).save_pretrained(tmp_path / "snapshot")
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("aiether.training.against.no_answer", lambda name, kind: None)
    assert base_folder("someone/model") == tmp_path / "snapshot"
    assert (asked["name"], asked["local_files_only"]) == ("someone/model", False)
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in asked["allow_patterns"])


def test_without_an_answer_only_the_cache_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.training.against.no_answer", lambda name, kind: OSError("no network"))
    with pytest.raises(ValueError, match=r"'nobody/nothing' is not a folder.*no network"):
        base_folder("nobody/nothing")
    with pytest.raises(ValueError, match="is not a folder"):
        base_folder(str(tmp_path / "missing"))


def test_a_cache_that_fails_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = LLAMA.build(depth=1)
    assert decode_parity(model, torch.arange(4)) is not None
    forward = model.forward

    def failing(input_ids: Any, past_key_values: Any = None, use_cache: bool = False) -> Any:
        if past_key_values is not None:
            raise RuntimeError("shapes do not fit")
        return forward(input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(ValueError, match=r"shapes do not fit\); --parity_tokens 0"):
        evaluating._parity(model, torch.arange(4), False)
    assert evaluating._parity(model, torch.arange(0), False) is None
