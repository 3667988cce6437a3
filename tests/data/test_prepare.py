from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from aiether.data import DataConfig, PackedData, TokenFile, TokenMixture, _pack, prepare
from aiether.data._work import WorkFolder

from .corpus import make_document


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        dataset_path=str(corpus), cache_dir=str(tmp_path / "cache"), vocab_size=400, validation_fraction=0.1
    )


def ids_of(tokens: TokenFile | TokenMixture) -> list[int]:
    assert isinstance(tokens, TokenFile)
    return tokens[:].tolist()


def fours(tokens: TokenFile | TokenMixture) -> list[list[int]]:
    ids = ids_of(tokens)
    return [ids[start : start + 4] for start in range(0, len(ids), 4)]


def texts(data: PackedData, tokens: TokenFile | TokenMixture) -> list[str]:
    """The documents of one side, decoded."""
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    return tokenizer.decode(ids_of(tokens)).split(tokenizer.eos_token)[:-1]


def test_every_document_is_whole_on_one_side(config: DataConfig, documents: list[str]) -> None:
    data = prepare(config)
    train, validation = texts(data, data.train), texts(data, data.validation)
    assert set(train).isdisjoint(validation)
    assert sorted(train + validation) == sorted(documents)
    assert data.num_documents == 60
    assert data.train_bytes == sum(len(text.encode()) for text in train)
    assert data.validation_bytes == sum(len(text.encode()) for text in validation)
    assert data.train_bytes is not None
    assert data.validation_bytes is not None
    assert data.bytes_per_token == data.validation_bytes / len(data.validation)
    assert data.eos_token_id is not None
    assert 0.05 < data.validation_bytes / (data.train_bytes + data.validation_bytes) <= 0.1
    assert ids_of(data.validation).count(data.eos_token_id) == len(validation)


def test_equal_documents_lie_on_the_same_side(config: DataConfig, corpus: Path, documents: list[str]) -> None:
    for number, document in enumerate(documents):
        (corpus / f"copy-{number}.txt").write_text(document.replace(" ", "\n"), encoding="utf-8")
    data = prepare(config)
    train, validation = texts(data, data.train), texts(data, data.validation)
    assert len(train) + len(validation) == 120
    assert {" ".join(text.split()) for text in train}.isdisjoint(
        {" ".join(text.split()) for text in validation}
    )


def test_a_single_book_is_split_by_section(config: DataConfig, tmp_path: Path) -> None:
    book = "\n".join(make_document(seed, paragraphs=40) for seed in range(40))
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    data = prepare(replace(config, dataset_path=str(tmp_path / "book.txt")))
    train, validation = texts(data, data.train), texts(data, data.validation)
    assert data.num_documents == 1
    assert validation
    # Stretches of the book, in its order: where the other side has taken a section, there is a separator.
    assert all(stretch in book for stretch in train + validation)
    assert sum(map(len, train + validation)) == len(book)
    assert not [stretch for stretch in validation if any(stretch in other for other in train)]


def test_second_time_comes_from_the_cache(config: DataConfig, corpus: Path) -> None:
    first = prepare(config)
    phases: list[str] = []
    assert (
        replace(prepare(config, lambda phase, _: phases.append(phase)), train=first.train).source
        == first.source
    )
    assert phases == []
    (corpus / "000.txt").write_text("something else\n", encoding="utf-8")
    changed = prepare(config, lambda phase, _: phases.append(phase))
    assert list(dict.fromkeys(phases)) == ["reading", "training the tokenizer", "tokenising"]
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "change", [{"vocab_size": 300}, {"validation_fraction": 0.2}], ids=["vocab_size", "validation_fraction"]
)
def test_settings_that_change_the_tokens_change_the_fingerprint(config: DataConfig, change: dict) -> None:
    assert prepare(replace(config, **change)).fingerprint != prepare(config).fingerprint


def test_damaged_cache_is_made_again(config: DataConfig) -> None:
    first = prepare(config)
    tokens = ids_of(first.train)
    assert isinstance(first.train, TokenFile)
    os.truncate(first.train.path, 10)
    again = prepare(config)
    assert ids_of(again.train) == tokens
    assert again.fingerprint == first.fingerprint


def parts(config: DataConfig) -> list[Path]:
    return list((config.cache_root / "data").glob("*.part"))


@pytest.mark.parametrize("when", ["reading", "training the tokenizer", "tokenising"])
def test_an_interrupt_leaves_nothing_that_counts_as_data(config: DataConfig, when: str) -> None:
    def interrupt(phase: str, fraction: float) -> None:
        if phase == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, interrupt)
    assert not list((config.cache_root / "data").rglob("data.json"))
    assert prepare(config).num_documents == 60
    assert not parts(config)


def test_data_that_cannot_be_used_leaves_no_work_behind(config: DataConfig, corpus: Path) -> None:
    (corpus / "030.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare(config)
    assert not parts(config)


def test_what_was_done_is_not_done_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config)
    monkeypatch.setattr(_pack, "COMMIT_TOKENS", 200)
    monkeypatch.setattr(_pack, "_BATCH_CHARACTERS", 1000)
    again = replace(config, cache_dir=f"{config.cache_dir}-again")
    positions: list[int] = []
    for stop in (0.2, 0.5, 0.9):

        def interrupt(phase: str, fraction: float, stop: float = stop) -> None:
            if phase == "tokenising" and fraction > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(again, interrupt)
        [part] = parts(again)
        positions.append(WorkFolder(part).read_position().pieces)
        if len(positions) == 2:  # what was written after the last commit does not count
            with (part / "out" / "train.bin").open("ab") as file:
                file.write(b"half a write")
    assert 0 < positions[0] < positions[1] < positions[2] < 60
    phases: list[str] = []
    assert prepare(again, lambda phase, _: phases.append(phase)).fingerprint == whole.fingerprint
    assert set(phases) == {"tokenising"}


def test_work_whose_tokens_are_gone_is_begun_again(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pack, "COMMIT_TOKENS", 200)
    monkeypatch.setattr(_pack, "_BATCH_CHARACTERS", 1000)

    def interrupt(phase: str, fraction: float) -> None:
        if phase == "tokenising" and fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, interrupt)
    [part] = parts(config)
    os.truncate(part / "out" / "train.bin", 2)
    assert (
        prepare(config).fingerprint == prepare(replace(config, cache_dir=f"{config.cache_dir}2")).fingerprint
    )


CHILD = """
import os, sys
from aiether.data import DataConfig, prepare
def die(phase, fraction):
    if phase == sys.argv[3]:
        os._exit(9)
config = DataConfig(dataset_path=sys.argv[1], cache_dir=sys.argv[2], vocab_size=400, validation_fraction=0.1)
print(prepare(config, die).fingerprint)
"""


def child(config: DataConfig, hash_seed: int, die_in: str = "never") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(config.dataset_path), str(config.cache_dir), die_in],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("when", ["reading", "tokenising"])
def test_killed_preparation_is_taken_up_by_the_next(config: DataConfig, tmp_path: Path, when: str) -> None:
    process = child(config, 0, when)
    process.communicate()
    assert process.returncode == 9
    assert parts(config)
    data = prepare(config)
    assert not parts(config)
    assert data.fingerprint == prepare(replace(config, cache_dir=str(tmp_path / "other"))).fingerprint


FULL = """
import resource, sys
from aiether.data import DataConfig, _pack, prepare
_pack.COMMIT_TOKENS, _pack._BATCH_CHARACTERS = 200, 1000
config = DataConfig(dataset_path=sys.argv[1], cache_dir=sys.argv[2], vocab_size=400, validation_fraction=0.1)
def fill(phase, fraction):
    if phase == "tokenising":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, -1))
try:
    prepare(config, fill)
except OSError as error:
    print(error)
"""


def test_a_disk_that_cannot_take_more_keeps_what_is_there(config: DataConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(config.dataset_path), str(config.cache_dir)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "File too large: prepared data is kept in" in printed
    assert "cache_dir" in printed
    [part] = parts(config)
    assert WorkFolder(part).read_position().pieces > 0
    assert (
        prepare(config).fingerprint == prepare(replace(config, cache_dir=str(tmp_path / "other"))).fingerprint
    )


def test_processes_at_once_agree_with_each_other_and_with_another_cache(
    config: DataConfig, tmp_path: Path
) -> None:
    both = [child(config, seed) for seed in (1, 2)]
    printed = {process.communicate()[0].strip() for process in both}
    assert printed == {prepare(replace(config, cache_dir=str(tmp_path / "other"))).fingerprint}


def test_tokenizer_from_a_path_is_used_as_it_is(config: DataConfig, documents: list[str]) -> None:
    trained = prepare(replace(config, vocab_size=300))
    given = prepare(replace(config, tokenizer=str(trained.tokenizer_dir)))
    assert given.vocab_size == 300
    assert ids_of(given.train) == ids_of(trained.train)
    assert sorted(texts(given, given.train) + texts(given, given.validation)) == sorted(documents)


def test_saved_dataset_with_text_gives_what_files_give(
    config: DataConfig, documents: list[str], tmp_path: Path
) -> None:
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "set")
    from_set = prepare(replace(config, dataset_path=str(tmp_path / "set")))
    assert from_set.fingerprint == prepare(config).fingerprint


class TestTokenised:
    @pytest.fixture
    def rows(self) -> list[list[int]]:
        return [[number, 400 + number % 7, 2, 3] for number in range(100)]

    @pytest.fixture
    def ids(self, config: DataConfig, rows: list[list[int]], tmp_path: Path) -> DataConfig:
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "ids")
        return replace(config, dataset_path=str(tmp_path / "ids"))

    def test_ids_without_a_tokenizer_have_no_text(self, ids: DataConfig, rows: list[list[int]]) -> None:
        data = prepare(ids)
        both = fours(data.train) + fours(data.validation)
        assert sorted(both) == sorted(rows)
        assert data.vocab_size == 407
        assert (data.tokenizer_dir, data.eos_token_id, data.bytes_per_token) == (None, None, None)

    def test_a_tokenizer_gives_the_bytes_behind_ids(self, config: DataConfig, tmp_path: Path) -> None:
        trained = prepare(config)
        tokenizer = AutoTokenizer.from_pretrained(trained.tokenizer_dir)
        documents = [make_document(seed) + " é" for seed in range(50)]
        rows = [tokenizer(document)["input_ids"] + [tokenizer.eos_token_id] for document in documents]
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "ids")
        data = prepare(
            replace(config, dataset_path=str(tmp_path / "ids"), tokenizer=str(trained.tokenizer_dir))
        )
        assert data.train_bytes is not None
        assert data.validation_bytes is not None
        assert data.train_bytes + data.validation_bytes == sum(len(text.encode()) for text in documents)
        assert sorted(texts(data, data.train) + texts(data, data.validation)) == sorted(documents)

    def test_ids_above_the_tokenizers_vocabulary_are_refused(
        self, ids: DataConfig, config: DataConfig
    ) -> None:
        small = prepare(replace(config, vocab_size=300))
        with pytest.raises(ValueError, match=r"token id 40\d, the tokenizer's vocabulary has 300"):
            prepare(replace(ids, tokenizer=str(small.tokenizer_dir)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "vocab_size is 256; .* at least 257"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0; allowed is above 0 and at most 0.5"),
        ({"validation_fraction": 0.7}, "validation_fraction is 0.7"),
    ],
)
def test_settings_out_of_range_are_named(config: DataConfig, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, **settings))


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), (" \n\n ", "is empty"), ("one\n", "1 different document")]
)
def test_text_that_cannot_be_split_is_refused(
    config: DataConfig, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, dataset_path=str(tmp_path / "a.txt")))


def test_cache_that_cannot_be_written_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*cache_dir"):
        prepare(replace(config, cache_dir=str(tmp_path / "file")))


@pytest.mark.slow
def test_embedded_default_is_quick_and_quicker_the_second_time(tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    start = time.perf_counter()
    cold = prepare(config)
    cold_s, start = time.perf_counter() - start, time.perf_counter()
    warm = prepare(config)
    warm_s = time.perf_counter() - start
    assert cold_s < 60.0  # 5 s on two free cores; the machine that runs this may be busy
    assert warm_s < 1.0
    assert (cold.vocab_size, len(cold.train) > 1_500_000, len(cold.validation) > 20_000) == (4096, True, True)
    assert warm.fingerprint == cold.fingerprint
