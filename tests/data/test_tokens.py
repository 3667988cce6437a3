from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from aiether.data.tokens import TokenFile, TokenWriter, token_dtype


def write(path: Path, ids: list[int], vocab_size: int) -> TokenFile:
    with TokenWriter(path, vocab_size) as writer:
        writer.write(ids[:2])
        writer.write(np.array(ids[2:]))
    return TokenFile(path, writer.dtype)


@pytest.mark.parametrize(("vocab_size", "bits"), [(257, 16), (65536, 16), (65537, 32), (2**32, 32)])
def test_the_dtype_is_the_smallest_that_holds_the_vocabulary(
    tmp_path: Path, vocab_size: int, bits: int
) -> None:
    ids = [0, 1, vocab_size - 1, 5]
    tokens = write(tmp_path / "train.bin", ids, vocab_size)
    assert tokens.dtype.itemsize * 8 == bits
    assert len(tokens) == 4
    assert tokens[0:4].tolist() == ids


def test_vocabulary_above_the_largest_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"{2**32 + 1} entries; allowed are at most {2**32}"):
        token_dtype(2**32 + 1)


def test_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "train.bin", 300) as writer:
        with pytest.raises(ValueError, match="token id 300, the tokenizer's vocabulary has 300"):
            writer.write([1, 300])
        with pytest.raises(ValueError, match="token id -4"):
            writer.write([1, -4])


def test_it_pickles_as_a_path(tmp_path: Path) -> None:
    tokens = write(tmp_path / "train.bin", list(range(5000)), 5000)
    assert tokens[10:12].tolist() == [10, 11]
    packed = pickle.dumps(tokens)
    assert len(packed) < 1000
    assert pickle.loads(packed)[10:12].tolist() == [10, 11]  # noqa: S301 (made two lines above)


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    tokens = write(tmp_path / "train.bin", [], 300)
    assert len(tokens) == 0
    assert tokens[0:3].tolist() == []
