"""Hashing what is large tells how far it is."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from aiether.data import DataConfig, _bins, _hash, prepare
from aiether.data._hash import file_hash, shares

Told = list[tuple[str, float]]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.1, vocab_size=300)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Small ones, so that small data counts as large."""
    monkeypatch.setattr(_hash, "_PIECE", 256)
    monkeypatch.setattr(_hash, "TOLD_BYTES", 1024)
    return monkeypatch


def preparing(config: DataConfig) -> Told:
    told: Told = []
    prepare(config, lambda phase, fraction: told.append((phase, fraction)))
    return told


def assert_hashed_first(told: Told) -> None:
    others = [index for index, (phase, _) in enumerate(told) if phase != "hashing"]
    first = [fraction for _, fraction in told[: others[0] if others else len(told)]]
    assert len(first) > 2
    assert first == sorted(first)
    assert 0 < first[0] < 0.5 < first[-1] <= 1


def test_the_hash_is_sha_256_and_pieces_add_up(pieces: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(paths, (5000, 3192), strict=True):
        path.write_bytes(bytes(size))
    told: list[float] = []
    on_bytes = shares([*paths, tmp_path / "missing"], told.append)
    digests = [file_hash(path, on_bytes) for path in paths]
    assert digests == [hashlib.sha256(bytes(size)).digest() for size in (5000, 3192)]
    assert told == pytest.approx([number / 8 for number in range(1, 9)], abs=0.04)
    assert told[-1] == 1.0


def test_texts_are_hashed_with_progress(pieces: pytest.MonkeyPatch, config: DataConfig, corpus: Path) -> None:
    told = preparing(replace(config, dataset_path=str(corpus)))
    assert_hashed_first(told)
    assert next(phase for phase, _ in told if phase != "hashing") == "reading"
    assert_hashed_first(preparing(replace(config, dataset_path=str(corpus))))  # from the cache, too


def test_a_saved_dataset_is_hashed_with_progress(
    pieces: pytest.MonkeyPatch, config: DataConfig, documents: list[str], tmp_path: Path
) -> None:
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "saved")
    assert_hashed_first(preparing(replace(config, dataset_path=str(tmp_path / "saved"))))


def test_token_files_are_hashed_and_checked_with_progress(
    pieces: pytest.MonkeyPatch, config: DataConfig, tmp_path: Path
) -> None:
    pieces.setattr(_bins, "_CHUNK", 1000)
    np.random.default_rng(0).integers(0, 300, 9000).astype("<u2").tofile(tmp_path / "ids.bin")
    told = preparing(replace(config, dataset_path=str(tmp_path / "ids.bin")))
    assert_hashed_first(told)
    checked = [fraction for phase, fraction in told if phase == "checking the ids"]
    assert len(checked) > 5
    assert checked == sorted(checked)


def test_what_is_small_is_hashed_without_a_word(config: DataConfig, corpus: Path) -> None:
    assert "hashing" not in dict(preparing(replace(config, dataset_path=str(corpus))))
