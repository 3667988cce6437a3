from __future__ import annotations

from pathlib import Path

import pytest

from aiether.training.config import read_config, read_file, resolve, write_config
from aiether.training.settings_file import MAX_BYTES

TRAPS = {
    "a key twice": (b"lr: 1\nlr: 2\n", "line 2, column 1: lr is given twice: keep one"),
    "a tab": (b"lr:\t- 1\n", "line 1, column 4: .*; indent with spaces"),
    "an alias": (b"a: &a [1]\nlr: *a\n", r"line 2, column 5: aliases \(\*name\) are not read"),
    "a value that holds itself": (b"lr: &x [*x]\n", "aliases"),
    "a Python tag": (
        b"lr: !!python/object/apply:os.system ['touch MARKER']\n",
        "line 1, column 5: .*constructor",
    ),
    "a list of lists without end": (b"[" * 2000, "nests too deeply"),
    "a tag that does not fit": (b"lr: !!int ''\n", "does not fit its tag"),
    "a number of 6000 digits": (b"lr: " + b"9" * 6000, "does not fit its tag"),
    "two documents": (b"lr: 1\n---\nlr: 2\n", "another document"),
    "no text": (b"lr: \xff\n", "is not UTF-8 text"),
    "control characters": (b"lr: \0\n", "it is no YAML text"),
    "a list": (b"- lr\n", "holds no settings"),
    "a word": (b"lr\n", "holds no settings"),
    "a value of another type": (b"n_layer: {a: 1}\n", "n_layer is {'a': 1}: a whole number is meant"),
    "a huge value": (
        b"n_layer: [" + b"[1, 2], " * 900 + b"]\n",
        "n_layer is .{0,200}: a whole number is meant",
    ),
    "an unknown key": (b"learning_rate: 1\n", "unknown setting 'learning_rate'"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_yaml_can_do_beyond_settings_is_refused_in_one_line(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = TRAPS[trap]
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"run\.yaml'.*{message}") as refused:
        read_file(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


def test_doubling_lists_do_not_unfold(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)), "lr: *a39"]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="aliases"):
        read_file(tmp_path / "bomb.yaml")


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 64 KiB"):
        read_file(path)


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbflr: 0.001\n")
    assert read_file(tmp_path / "run.yaml") == {"lr": 0.001}


def test_the_file_of_a_run_must_hold_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(path, resolve("report", {}, {"lr": 0.25}))
    kept = [line for line in path.read_text().splitlines() if not line.startswith(("lr:", "seed:"))]
    path.write_text("\n".join(kept))
    with pytest.raises(ValueError, match=r"config\.yaml' lacks lr, seed: .*restore it"):
        read_config(path)
