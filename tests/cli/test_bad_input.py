"""Bad input from the command line, before any long work: one line that says what to do, and status 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.training.corpus import write_corpus
from tests.training.tiny_run import TINY_RUN, as_flags

from aiether.cli import main

SMALL = {"max_steps": 2, "batch_size": 2, "eval_batches": 1, "validation_fraction": 0.2, "trigger": "never"}
TINY = as_flags(TINY_RUN | SMALL)

FLAGS = {
    "--n_embd 15": "n_embd is 15, not a multiple of n_head (2): change one of them",
    "--n_layer -1": "n_layer is -1: it must be at least 1",
    "--batch_size 0": "batch_size is 0: it must be at least 1",
    "--lr nan": "lr is nan: it must be greater than 0",
    "--lr 1e400": "lr is inf: it must be greater than 0",
    "--lr 1e300": "lr is 1e+300: it must be at most 1,000",
    "--dropout -0.1": "dropout is -0.1: it must be from 0 to below 1",
    "--max_steps 10000000000000000000000": "max_steps is 10000000000000000000000: it must be at most",
    "--batch_size 100000000000000000000": "it must be at most 65,536",
    "--vocab_size 9999999999999999999999": "it must be at most 10,000,000",
    "--seed 4294967296": "seed is 4294967296: it must be at most 4,294,967,295",
    "--k_subspace 99999999999999": "k_subspace is 99999999999999: it must be at most 1,000,000",
    "--noise inf": "noise is inf",
    "--lr=": "--lr needs a value",
    "--lr 1 2": "unexpected '2' after --lr 1",
    "--preset=": "--preset needs a value",
    "--learning-rate 1": "unknown flag '--learning-rate'",
    "--jjj 1": "unknown flag '--jjj'; aiether train --help lists them",
    "-x": "unexpected '-x'",
    "--cache_dir ~nobody-here/x": "cache_dir is '~nobody-here/x': there is no such user",
    "--dataset_path ~nobody-here/x": "dataset_path is '~nobody-here/x': there is no such user",
    "--cache_dir /proc/none": "give a writable folder with cache_dir",
    "--output_dir /proc/none": "output_dir '/proc/none' cannot be written",
    "--output_dir words.txt": "output_dir 'words.txt' cannot be a folder: 'words.txt' is a file",
    "--output_dir words.txt/run": "cannot be a folder",
    "--config words.txt": "config file 'words.txt'",
    "--config .": "config file '.' does not exist; name a YAML file",
    "--tokenizer words.txt": "tokenizer 'words.txt' cannot be read",
    "--context_length 100000": "less than one window of context_length 100000",
}
DATA: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is empty; give a source that holds text"),
    "blank.txt": (b" \n\n\t", "is empty; give a source that holds text"),
    "binary.txt": (b"abc\0def" * 50, "is a binary file"),
    "latin1.txt": ("café ".encode("latin-1") * 300, "is not UTF-8 text"),
    "short.txt": (b"a b c\n<|endoftext|>\nd e f", "less than one window"),
    "not.gz": (b"no gzip", "cannot be decompressed"),
    "some.zip": (b"PK\x03\x04\x14\0\0\0../../escaped.txt", "is a binary file"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "words.txt", documents=40)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that is refused."""
    before = sorted(Path().iterdir())
    assert main(arguments) == 2
    assert sorted(path for path in Path().iterdir() if path.name != "cache") == before, "it left something"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("aiether ")
    return said


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = [*TINY, "--dataset_path", "words.txt", "--cache_dir", "cache"]
    assert FLAGS[flags] in refused(["train", *base, *flags.split()], capsys)


@pytest.mark.parametrize("flag", ["dataset_path", "tokenizer", "cache_dir", "output_dir"])
@pytest.mark.parametrize("path", [" ", "a\0b", "\udcff"], ids=["blank", "NUL", "surrogate"])
def test_paths_that_no_system_has(flag: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} is {path!r}" in refused(["train", f"--{flag}", path], capsys)


def test_a_prompt_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert "characters that are no text" in refused(["train", "--sample_prompt", "\udcff"], capsys)
    assert "characters that are no text" in refused(["generate", ".", "\udcff"], capsys)


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = DATA[name]
    (here / name).write_bytes(content)
    base = [*TINY, "--cache_dir", "cache"]
    assert message in refused(["train", *base, "--dataset_path", name], capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_in_a_folder_does_not_hang(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    (here / "texts").mkdir()
    os.mkfifo(here / "texts" / "pipe.txt")
    said = refused(["train", *TINY, "--dataset_path", "texts", "--cache_dir", "cache"], capsys)
    assert "pipe.txt cannot be read" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("report . --x", "unknown flag '--x': there are none"),
        ("report a b", "unexpected 'b'"),
        ("report words.txt", "holds no run"),
        ("generate words.txt ab", "is not a folder"),
        ("generate . ab", "holds no model"),
        ("generate . ab --temperature nan", "temperature is nan"),
        ("generate . ab --temperature 1e-300", "temperature is 1e-300: it must be 0 (greedy) or at least"),
        ("generate . ab --seed 99999999999999999999999", "seed is 99999999999999999999999: it must be 0 to"),
        ("generate . ab --top_k x", "--top_k is 'x': a whole number"),
        ("train --resume words.txt", "holds no run"),
        ("train --resume .", "holds no run"),
        ("train --resume . --preset report", "remove --preset"),
    ],
)
def test_other_commands(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(arguments.split(), capsys)
