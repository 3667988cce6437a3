from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, default_data_collator

from aiether.data import DataConfig, TokenFile, TokenMixture, TokenWindows, prepare
from aiether.data.mixture import CYCLE, Schedule

from .corpus import make_document

weights = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6)


@given(weights, st.integers(1, 3 * CYCLE))
def test_after_any_number_of_windows_each_source_has_had_its_share(shares: list[float], length: int) -> None:
    schedule = Schedule(shares)
    exact = np.array(shares) / sum(shares) * length
    # Rounding to CYCLE parts moves a share by 1 / CYCLE at most; the order adds about one a source.
    assert np.abs(np.array(schedule.taken(length)) - exact).max() <= len(shares) + 2 * length / CYCLE


@given(weights, st.integers(0, 3 * CYCLE))
def test_every_window_of_a_source_comes_once_and_in_turn(shares: list[float], start: int) -> None:
    schedule = Schedule(shares)
    before = schedule.taken(start)
    for index in range(start, start + 200):
        source, number = schedule.locate(index)
        assert number == before[source]
        before[source] += 1
    assert before == schedule.taken(start + 200)


def test_the_order_is_written_in_stone() -> None:
    # A change here would change the data of every resumed run.
    schedule = Schedule([0.5, 0.3, 0.2])
    assert [schedule.locate(i)[0] for i in range(12)] == [0, 1, 2, 0, 1, 0, 0, 2, 1, 0, 0, 1]
    assert schedule.locate(10 * CYCLE + 3) == (0, 10 * schedule.counts[0] + 1)


@pytest.fixture
def mixture(tmp_path: Path) -> TokenMixture:
    """Three files whose ids tell the file (thousands) and the place."""
    parts = []
    for source, length in enumerate((1000, 400, 90)):
        path = tmp_path / f"{source}.bin"
        (1000 * source + np.arange(length)).astype("<u2").tofile(path)
        parts.append(TokenFile(path, "<u2"))
    return TokenMixture(tuple(parts), (0.5, 0.3, 0.2))


def test_each_source_goes_through_its_own_epochs(mixture: TokenMixture) -> None:
    windows = TokenWindows(mixture, 10, seed=3, num_windows=200)
    starts = [int(windows[i]["input_ids"][0]) for i in range(200)]
    by_source = [[start % 1000 for start in starts if start // 1000 == source] for source in range(3)]
    assert [len(found) for found in by_source] == [100, 60, 40]
    assert sorted(by_source[0]) == list(range(0, 1000, 10))
    assert sorted(by_source[1][:40]) == list(range(0, 400, 10))
    for epoch in range(4):
        assert sorted(by_source[2][9 * epoch : 9 * epoch + 9]) == list(range(0, 90, 10))
    assert by_source[2][:9] != by_source[2][9:18]
    assert len(mixture) == 1490


def test_a_position_is_one_integer(mixture: TokenMixture) -> None:
    windows = TokenWindows(mixture, 10, seed=3, num_windows=5000)
    resumed = pickle.loads(pickle.dumps(windows))  # noqa: S301 (made here)
    for index in (4999, 0, 17, 200, 1500):
        assert torch.equal(resumed[index]["input_ids"], windows[index]["input_ids"])
    indices = [5, 0, 41, 99]
    together = default_data_collator(windows.__getitems__(indices))
    one_by_one = default_data_collator([windows[index] for index in indices])
    assert torch.equal(together["input_ids"], one_by_one["input_ids"])


def test_validation_takes_the_same_shares_and_nothing_twice(mixture: TokenMixture) -> None:
    windows = TokenWindows(mixture, 10, seed=None, num_windows=30)
    starts = [int(windows[i]["input_ids"][0]) for i in range(len(windows))]
    assert [sum(start // 1000 == source for start in starts) for source in range(3)] == [15, 9, 6]
    assert max(start for start in starts if start < 1000) > 800  # spread over the file
    everything = TokenWindows(mixture, 10, seed=None)
    starts = [int(everything[i]["input_ids"][0]) for i in range(len(everything))]
    assert len(set(starts)) == len(starts)
    assert 40 <= len(starts) <= 50  # the smallest has 9 windows, a fifth of 45


def test_a_source_of_less_than_a_window_is_named(mixture: TokenMixture) -> None:
    with pytest.raises(ValueError, match="2 data holds 90 tokens, less than one window"):
        TokenWindows(mixture, 100, seed=0)


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    other = tmp_path / "other.txt"
    other.write_text("<|endoftext|>\n".join(make_document(seed).upper() for seed in range(100, 140)))
    return DataConfig(
        dataset_path=(str(corpus), str(other)),
        dataset_weights=(3.0, 1.0),
        cache_dir=str(tmp_path / "cache"),
        vocab_size=400,
        validation_fraction=0.1,
    )


def test_one_tokenizer_serves_all_sources(config: DataConfig) -> None:
    data = prepare(config)
    assert isinstance(data.train, TokenMixture)
    assert data.train.shares == (0.75, 0.25)
    assert data.num_documents == 100
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    lower, upper = (tokenizer.decode(part[:].tolist()) for part in data.train.parts)
    assert "river" in lower
    assert "RIVER" in upper
    assert len(tokenizer.encode("RIVER STONE")) < 8  # both sources shaped the vocabulary
    assert data.bytes_per_token is not None
    assert data.validation_bytes is not None


def test_bytes_per_token_follow_the_shares(config: DataConfig) -> None:
    data = prepare(config)
    tokenizer = str(data.tokenizer_dir)
    alone = [
        prepare(replace(config, dataset_path=path, dataset_weights=None, tokenizer=tokenizer))
        for path in config.dataset_paths
    ]
    assert alone[0].bytes_per_token is not None
    assert alone[1].bytes_per_token is not None
    mixed = 0.75 * alone[0].bytes_per_token + 0.25 * alone[1].bytes_per_token
    assert data.bytes_per_token == pytest.approx(mixed)


def test_weights_are_part_of_the_data_and_default_to_the_sizes(config: DataConfig) -> None:
    data, by_size = prepare(config), prepare(replace(config, dataset_weights=None))
    assert data.fingerprint != by_size.fingerprint
    assert data.fingerprint == prepare(config).fingerprint
    assert isinstance(by_size.train, TokenMixture)
    first, second = by_size.train.parts
    assert by_size.train.shares == pytest.approx(
        (len(first) / len(by_size.train), len(second) / len(by_size.train))
    )


def test_text_and_ids_mix_only_under_a_tokenizer_that_is_named(config: DataConfig, tmp_path: Path) -> None:
    rows = {"input_ids": [[n, n + 1, 5, 6] for n in range(100)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "ids")
    mixed = replace(config, dataset_path=(config.dataset_paths[0] or "", str(tmp_path / "ids")))
    with pytest.raises(ValueError, match=r"mixes text .* and token ids; .*tokenizer"):
        prepare(mixed)
    tokenizer = str(prepare(config).tokenizer_dir)
    assert prepare(replace(mixed, tokenizer=tokenizer)).num_documents == 160


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_weights": (1.0,)}, r"dataset_weights has 1 values for 2 source\(s\)"),
        ({"dataset_weights": (1.0, 0.0)}, "dataset_weights is 1.0, 0.0; each must be a number above 0"),
        ({"dataset_weights": (1.0, float("nan"))}, "each must be a number above 0"),
        ({"dataset_path": (), "dataset_weights": None}, "dataset_path names no source"),
    ],
)
def test_weights_that_cannot_be_are_named(config: DataConfig, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, **settings))
