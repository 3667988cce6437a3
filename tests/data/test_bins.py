from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from aiether.data import DataConfig, PackedData, TokenFile, TokenWindows, prepare
from aiether.data.tokenizer import train_tokenizer

from .corpus import make_document


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.1)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, 2000)


def read(config: DataConfig, path: Path, **settings: str) -> PackedData:
    return prepare(DataConfig(**{**vars(config), "dataset_path": str(path), **settings}))


def both(data: PackedData) -> tuple[list[int], list[int]]:
    assert isinstance(data.train, TokenFile)
    assert isinstance(data.validation, TokenFile)
    return data.train[:].tolist(), data.validation[:].tolist()


def test_a_folder_keeps_its_split_and_is_not_copied(
    config: DataConfig, ids: np.ndarray, tmp_path: Path
) -> None:
    ids[:1500].astype("<u2").tofile(tmp_path / "train.bin")
    ids[1500:].astype("<u2").tofile(tmp_path / "val.bin")
    data = read(config, tmp_path)
    assert both(data) == (ids[:1500].tolist(), ids[1500:].tolist())
    assert (data.vocab_size, data.num_documents, data.bytes_per_token) == (int(ids.max()) + 1, None, None)
    assert isinstance(data.train, TokenFile)
    assert data.train.path == tmp_path / "train.bin"
    assert not list(config.cache_root.rglob("*.bin"))
    assert TokenWindows(data.train, 100, seed=None)[2]["input_ids"].tolist() == ids[200:300].tolist()


def test_of_a_single_file_the_end_is_held_out(config: DataConfig, ids: np.ndarray, tmp_path: Path) -> None:
    ids.astype("<u2").tofile(tmp_path / "all.bin")
    data = read(config, tmp_path / "all.bin")
    assert both(data) == (ids[:1800].tolist(), ids[1800:].tolist())
    with pytest.raises(ValueError, match="validation data holds 200 tokens"):
        TokenWindows(data.validation, 201, seed=None)


@pytest.mark.parametrize("sidecar", [{"dtype": "uint32"}, {"vocab_size": 70_000}, None])
def test_the_type_comes_from_the_setting_or_from_beside_the_file(
    config: DataConfig, ids: np.ndarray, tmp_path: Path, sidecar: dict | None
) -> None:
    ids.astype("<u4").tofile(tmp_path / "all.bin")
    if sidecar is None:
        data = read(config, tmp_path / "all.bin", token_dtype="uint32")
    else:
        (tmp_path / "meta.json").write_text(json.dumps(sidecar))
        data = read(config, tmp_path / "all.bin")
    assert both(data)[0] == ids[:1800].tolist()


def test_a_file_of_llm_c_is_read_after_its_header(
    config: DataConfig, ids: np.ndarray, tmp_path: Path
) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "all.bin").write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    assert both(read(config, tmp_path / "all.bin")) == (ids[:1800].tolist(), ids[1800:].tolist())


def test_other_tokens_have_another_fingerprint(config: DataConfig, ids: np.ndarray, tmp_path: Path) -> None:
    ids.astype("<u2").tofile(tmp_path / "all.bin")
    before = read(config, tmp_path / "all.bin").fingerprint
    assert read(config, tmp_path / "all.bin").fingerprint == before
    ids[5] = (ids[5] + 1) % 300
    ids.astype("<u2").tofile(tmp_path / "all.bin")
    assert read(config, tmp_path / "all.bin").fingerprint != before


def test_the_tokenizer_gives_bytes_and_bounds_the_ids(config: DataConfig, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([make_document(seed) for seed in range(30)], 300)
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "bins"
    folder.mkdir()
    text = make_document(99)
    [encoded] = tokenizer.encode([text])
    for name in ("train.bin", "validation.bin"):
        np.array([*encoded, tokenizer.eos_token_id], dtype="<u2").tofile(folder / name)
    data = read(config, folder, tokenizer=str(tmp_path / "tokenizer"))
    assert data.validation_bytes == len(text.encode())
    assert data.bytes_per_token == len(text.encode()) / (len(encoded) + 1)
    assert data.eos_token_id == tokenizer.eos_token_id
    np.array([5, 301] * 50, dtype="<u2").tofile(folder / "train.bin")
    with pytest.raises(ValueError, match=r"token id 301, the tokenizer's vocabulary has 300 .*token_dtype"):
        read(config, folder, tokenizer=str(tmp_path / "tokenizer"))


def test_what_is_no_token_file_is_refused(config: DataConfig, ids: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "all.bin"
    ids.astype("<u2").tofile(path)
    os.truncate(path, 3001)
    with pytest.raises(ValueError, match=r"all\.bin is 3001 bytes long.*uint16.*token_dtype"):
        read(config, path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is 0 bytes long"):
        read(config, path)
    ids.astype("<u4").tofile(path)
    with pytest.raises(ValueError, match="looks like uint32; set token_dtype uint32"):
        read(config, path)
    (ids + 300).astype("<u2").tofile(path)
    with pytest.raises(ValueError, match="looks like uint16; set token_dtype uint16"):
        read(config, path, token_dtype="uint32")
    path.rename(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"holds train\.bin and no val\.bin"):
        read(config, tmp_path)
    with pytest.raises(ValueError, match="token_dtype is 'int64'; allowed are uint16 and uint32"):
        read(config, tmp_path, token_dtype="int64")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is not JSON .*token_dtype"):
        read(config, tmp_path / "train.bin")
