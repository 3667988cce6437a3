from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from aiether.data.config import DataConfig
from aiether.data.sources import Section, Source, TextFiles, find_source, is_text_name, standard_library


def read(source: Source, limit: int = 1 << 20) -> list[Section]:
    return list(source.sections(limit, lambda _: None))


def texts(source: Source) -> list[str]:
    return [str(section.content) for section in read(source)]


def find(path: Path | str, text_column: str = "text") -> Source:
    return find_source(str(path), DataConfig(text_column=text_column))


def test_file_folder_and_glob_read_the_same_documents(
    corpus: Path, documents: list[str], tmp_path: Path
) -> None:
    single = tmp_path / "all.txt"
    single.write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    assert texts(find(corpus)) == documents
    assert texts(find(f"{corpus}/*.txt")) == documents
    assert texts(find(single)) == documents


def test_folder_is_read_with_its_subfolders_and_without_what_is_no_text(corpus: Path) -> None:
    (corpus / "deep" / "er").mkdir(parents=True)
    (corpus / "deep" / "er" / "notes.md").write_text("notes\n", encoding="utf-8")
    (corpus / "picture.png").write_bytes(b"\x89PNG\0")
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "secret.txt").write_text("secret\n", encoding="utf-8")
    (corpus / "empty.txt").touch()
    found = texts(find(corpus))
    assert len(found) == 61
    assert "notes\n" in found
    assert "secret\n" not in found


def test_progress_ends_at_one(corpus: Path) -> None:
    shares: list[float] = []
    list(find(corpus).sections(100, shares.append))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_content_hash_follows_the_content_and_not_its_place(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)
    assert find(moved).content_hash(lambda _: None) == find(corpus).content_hash(lambda _: None)
    (moved / "000.txt").write_text("other\n", encoding="utf-8")
    assert find(moved).content_hash(lambda _: None) != find(corpus).content_hash(lambda _: None)


@pytest.mark.parametrize(
    ("name", "is_text"),
    [
        ("a.txt", True),
        ("a.TXT.GZ", True),
        ("a.py.zst", True),
        ("a.parquet", True),
        ("a.jsonl.zst", True),
        ("a.json", False),
        ("a.bin", False),
        ("a.tar.xz", False),
    ],
)
def test_text_is_known_by_its_name(name: str, is_text: bool) -> None:
    assert is_text_name(name) is is_text


def test_missing_path_says_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.* does not exist; allowed are a file of text"):
        find(tmp_path / "nowhere")


def test_folder_and_glob_without_text_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no text files.*glob"):
        find(tmp_path)
    with pytest.raises(ValueError, match="matches no file"):
        find(f"{tmp_path}/*.txt")


def test_standard_library_is_source_without_tests_and_tables() -> None:
    source = standard_library()
    names = [path.as_posix() for path in source.paths]
    assert any(name.endswith("/argparse.py") for name in names)
    for left_out in (
        "/test/",
        "/site-packages/",
        "/encodings/",
        "/pydoc_data/",
        "/idle_test/",
        "_sysconfigdata",
    ):
        assert not [name for name in names if left_out in name]
    assert 5_000_000 < sum(path.stat().st_size for path in source.paths) < 15_000_000


class TestSavedDataset:
    def test_one_row_is_one_document(self, tmp_path: Path, documents: list[str]) -> None:
        datasets.Dataset.from_dict({"body": documents, "n": list(range(60))}).save_to_disk(tmp_path / "set")
        source = find(tmp_path / "set", text_column="body")
        assert texts(source) == documents
        assert all(section.last for section in read(source))

    def test_train_split_of_several_is_read(self, tmp_path: Path, documents: list[str]) -> None:
        splits = {"train": documents[:50], "test": documents[50:]}
        whole = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()})
        whole.save_to_disk(tmp_path / "set")
        assert texts(find(tmp_path / "set")) == documents[:50]
        del whole["train"]
        whole.save_to_disk(tmp_path / "other")
        with pytest.raises(ValueError, match="splits test and no `train`"):
            find(tmp_path / "other")

    def test_ids_are_read_as_they_are_without_padding(self, tmp_path: Path) -> None:
        rows = {"input_ids": [[5, 6, 7, 0], [8, 9, 0, 0]], "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]]}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
        source = find(tmp_path / "set")
        assert source.is_tokenised
        assert [np.asarray(section.content).tolist() for section in read(source)] == [[5, 6, 7], [8, 9]]
        assert [(np.asarray(s.content).tolist(), s.last) for s in read(source, 2)] == [
            ([5, 6], False),
            ([7], True),
            ([8, 9], True),
        ]

    def test_rows_of_unequal_length_across_batches(self, tmp_path: Path) -> None:
        rows = [list(range(n % 5)) for n in range(600)]
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "set")
        found = [np.asarray(section.content).tolist() for section in read(find(tmp_path / "set"))]
        assert found == [row for row in rows if row]

    def test_unknown_column_lists_those_there_are(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=r"columns body, neither `input_ids` nor text_column 'text'"):
            find(tmp_path / "set")

    @pytest.mark.parametrize(
        "rows", [{"text": ["a", None]}, {"input_ids": [[1], [-2]]}, {"input_ids": [[0.5]]}]
    )
    def test_rows_that_are_neither_text_nor_ids_are_refused(
        self, tmp_path: Path, rows: dict[str, list]
    ) -> None:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=r"row \d of .* holds"):
            read(find(tmp_path / "set"))

    def test_broken_folder_is_one_line(self, tmp_path: Path, documents: list[str]) -> None:
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "set")
        next((tmp_path / "set").glob("*.arrow")).write_bytes(b"broken")
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            find(tmp_path / "set")
        assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        TextFiles((tmp_path / "gone.txt",), "gone").content_hash(lambda _: None)


@pytest.mark.parametrize("offset", [-5, 2**30])
@pytest.mark.parametrize("at", [1, 30, 60])
def test_a_saved_dataset_whose_lengths_are_damaged_is_refused(
    tmp_path: Path, documents: list[str], offset: int, at: int
) -> None:
    """The lengths lead outside of the file, where pyarrow would read."""
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    offsets = np.cumsum([0, *(len(text.encode()) for text in documents)]).astype("<i4")
    damaged = offsets.copy()
    damaged[at] = offset
    content = file.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    file.write_bytes(content.replace(offsets.tobytes(), damaged.tobytes()))
    source = find_source(str(tmp_path / "saved"), DataConfig())
    with pytest.raises(ValueError, match=r"saved is damaged \(.*\); save the dataset again") as caught:
        list(source.sections(1 << 20, lambda _: None))
    assert "\n" not in str(caught.value)
