from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from aiether.data._text import END_OF_TEXT
from aiether.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_hash, train_tokenizer

from .corpus import make_document

TRAINED = train_tokenizer([make_document(seed) for seed in range(30)], 300)


@given(st.text())
def test_any_text_survives_the_way_to_tokens_and_back(text: str) -> None:
    [ids] = TRAINED.encode([text])
    assert TRAINED.backend.decode(ids, skip_special_tokens=False) == text
    assert TRAINED.decoded_bytes(ids) == len(text.encode())


def test_text_that_spells_the_separator_is_not_the_separator() -> None:
    [ids] = TRAINED.encode([f"the token {END_OF_TEXT} ends a document"])
    assert TRAINED.eos_token_id not in ids


def test_training_is_deterministic_and_small_data_gives_fewer_entries() -> None:
    again = train_tokenizer([make_document(seed) for seed in range(30)], 300)
    assert again.backend.to_str() == TRAINED.backend.to_str()
    assert TRAINED.vocab_size == 300
    assert train_tokenizer(["ab ab"], 4096).vocab_size < 300


def test_saved_folder_is_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = make_document(99)
    assert loaded(text)["input_ids"] == TRAINED.encode([text])[0]
    assert loaded.decode(TRAINED.encode([text])[0]) == text
    assert (loaded.eos_token, loaded.eos_token_id) == (END_OF_TEXT, TRAINED.eos_token_id)
    assert len(loaded) == TRAINED.vocab_size


def same(a: TextTokenizer, b: TextTokenizer) -> bool:
    text = make_document(7)
    return (a.encode([text]), a.eos_token_id, a.vocab_size) == (
        b.encode([text]),
        b.eos_token_id,
        b.vocab_size,
    )


def test_folder_file_and_older_form_load_alike(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "folder")
    assert same(load_tokenizer(str(tmp_path / "folder")), TRAINED)
    assert same(load_tokenizer(str(tmp_path / "folder" / "tokenizer.json")), TRAINED)
    older = tmp_path / "older"
    older.mkdir()
    model = json.loads(TRAINED.backend.to_str())["model"]
    (older / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (older / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]), encoding="utf-8")
    (older / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8"
    )
    assert same(load_tokenizer(str(older)), TRAINED)


def test_the_folder_names_its_end_token(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "<stop>": 1, "a": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no token that ends a document; .*<\|endoftext\|>"):
        load_tokenizer(str(tmp_path))
    settings = {"eos_token": {"content": "<stop>"}, "pad_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == 1
    loaded.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token == "[UNK]"


def test_hash_follows_the_files(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "a")
    TRAINED.save(tmp_path / "b")
    before = tokenizer_hash(str(tmp_path / "a"))
    assert before == tokenizer_hash(str(tmp_path / "b"))
    (tmp_path / "a" / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert tokenizer_hash(str(tmp_path / "a")) != before


@pytest.mark.parametrize("read", [load_tokenizer, tokenizer_hash])
def test_missing_path_names_the_next_step(read: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"'/nowhere/tokenizer.json' does not exist; allowed .*on the Hub"):
        read("/nowhere/tokenizer.json")


@pytest.mark.parametrize("read", [load_tokenizer, tokenizer_hash])
def test_a_name_that_the_hub_does_not_give_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Callable[[str], object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'some/name' does not exist here.*Hub.*save_pretrained") as caught:
        read("some/name")
    assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_is_downloaded_without_its_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    TRAINED.save(tmp_path / "snapshot")
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.extend([name, *allow_patterns])
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("aiether.data.tokenizer.no_answer", lambda name, kind: None)
    assert same(load_tokenizer("some/name"), TRAINED)
    assert tokenizer_hash("some/name") == tokenizer_hash(str(tmp_path / "snapshot"))
    assert asked[0] == "some/name"
    assert not [pattern for pattern in asked if "safetensors" in pattern or pattern == "*"]


def test_without_a_network_a_name_in_the_hub_s_cache_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--name"
    TRAINED.save(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert same(load_tokenizer("some/name"), TRAINED)


def test_the_original_files_of_gpt2_are_a_tokenizer(tmp_path: Path) -> None:
    model = json.loads(TRAINED.backend.to_str())["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    loaded = load_tokenizer(str(tmp_path))
    assert same(loaded, TRAINED)
    [ids] = loaded.encode([f"a {END_OF_TEXT} in the text"])
    assert loaded.eos_token_id not in ids
    before = tokenizer_hash(str(tmp_path))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n", encoding="utf-8")
    assert tokenizer_hash(str(tmp_path)) != before
    loaded.save(tmp_path / "saved")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")(make_document(3))["input_ids"]
        == (loaded.encode([make_document(3)])[0])
    )


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder without a tokenizer"):
        tokenizer_hash(str(tmp_path / "empty"))
