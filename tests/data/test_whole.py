from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from aiether.data import DataConfig, whole_text
from aiether.data.tokenizer import TextTokenizer, train_tokenizer

from .corpus import make_document


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer([make_document(seed) for seed in range(20)], 300)


def config(path: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(dataset_path=str(path), cache_dir=str(tmp_path / "cache"))


def test_every_document_is_there_in_order_and_ends_with_its_token(
    corpus: Path, documents: list[str], tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    text = whole_text(config(corpus, tmp_path), tokenizer)
    expected = [id for ids in tokenizer.encode(documents) for id in [*ids, tokenizer.eos_token_id]]
    assert text.tokens[:].tolist() == expected
    nbytes = sum(len(document.encode()) for document in documents)
    assert text.bytes_per_token == nbytes / len(expected)


def test_it_is_tokenised_once_for_a_content_and_a_tokenizer(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    def phases(which: TextTokenizer) -> set[str]:
        told: list[str] = []
        whole_text(config(corpus, tmp_path), which, lambda phase, _: told.append(phase))
        return set(told)

    assert "tokenising" in phases(tokenizer)
    assert not phases(tokenizer)
    assert "tokenising" in phases(train_tokenizer([make_document(99)], 280))
    (corpus / "000.txt").write_text("another text")
    assert "tokenising" in phases(tokenizer)


def test_a_cached_text_that_was_cut_is_made_anew(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    first = whole_text(config(corpus, tmp_path), tokenizer)
    expected = first.tokens[:].tolist()
    first.tokens.path.write_bytes(b"\0\0")
    assert whole_text(config(corpus, tmp_path), tokenizer).tokens[:].tolist() == expected


def test_tokens_are_taken_as_they_are(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    ids = np.random.default_rng(0).integers(0, 200, 500)
    ids.astype("<u2").tofile(tmp_path / "all.bin")
    single = whole_text(config(tmp_path / "all.bin", tmp_path), None)
    assert single.tokens[:].tolist() == ids.tolist()
    assert single.bytes_per_token is None
    assert whole_text(config(tmp_path / "all.bin", tmp_path), tokenizer).bytes_per_token == pytest.approx(
        len(tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True).encode()) / 500
    )
    (tmp_path / "two").mkdir()
    ids[:400].astype("<u2").tofile(tmp_path / "two" / "train.bin")
    ids[400:].astype("<u2").tofile(tmp_path / "two" / "val.bin")
    assert whole_text(config(tmp_path / "two", tmp_path), None).tokens[:].tolist() == ids[400:].tolist()
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 70_000], [8]]})
    rows.save_to_disk(str(tmp_path / "rows"))
    assert whole_text(config(tmp_path / "rows", tmp_path), None).tokens[:].tolist() == [5, 6, 70_000, 8]


def test_what_cannot_be_evaluated_on_is_refused(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    with pytest.raises(ValueError, match=r"is text, and there is no tokenizer.*--tokenizer"):
        whole_text(config(corpus, tmp_path), None)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        whole_text(config(tmp_path / "empty.txt", tmp_path), tokenizer)
    with pytest.raises(ValueError, match="one by one"):
        whole_text(DataConfig(dataset_path=("a.txt", "b.txt")), tokenizer)
    with pytest.raises(ValueError, match="does not exist"):
        whole_text(config(tmp_path / "none.txt", tmp_path), tokenizer)
