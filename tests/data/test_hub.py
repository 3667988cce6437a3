from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from aiether.data import DataConfig, _hub, prepare
from aiether.data._hub import HubName


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        dataset_path="hub:owner/name", cache_dir=str(tmp_path / "cache"), vocab_size=300, text_column="body"
    )


class Hub:
    """Answers `load_dataset` with a real stream over rows; breaks after `fails_after` of them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked, self.read = rows, list[tuple[Any, ...]](), 0
        self.fails_after: int | None = None

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        self.asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(self._stream)

    def _stream(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows):
            if number == self.fails_after:
                raise ConnectionError("the connection was reset")
            self.read += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> Hub:
    found = Hub([{"n": n, "body": text} for n, text in enumerate(documents)])
    monkeypatch.setattr(datasets, "load_dataset", found.load_dataset)
    monkeypatch.setattr(_hub, "no_answer", lambda name, kind: None)
    return found


def texts(config: DataConfig, spec: str = "hub:owner/name") -> list[str]:
    source = _hub.hub_source(spec, config, lambda *_: None)
    return [str(section.content) for section in source.sections(1 << 20, lambda _: None)]


def test_rows_are_streamed_once_and_then_need_no_network(
    hub: Hub, config: DataConfig, documents: list[str]
) -> None:
    assert texts(config) == documents
    assert hub.asked == [("owner/name", None, "train", True)]
    assert texts(config) == documents
    assert len(hub.asked) == 1
    data = prepare(config)
    assert (data.num_documents, data.source) == (60, "hub:owner/name:train")


def test_a_broken_stream_goes_on_after_its_last_shard(
    hub: Hub, config: DataConfig, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hub, "SHARD_BYTES", 5000)
    hub.fails_after = 40
    with pytest.raises(ValueError, match=r"cannot be read from the Hub .*reset.*check") as caught:
        texts(config)
    assert "\n" not in str(caught.value)
    [folder] = (path for path in (config.cache_root / "hub").iterdir() if path.is_dir())
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl.zst")}
    assert kept
    hub.fails_after = None
    assert texts(config) == documents
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.zst")}.items()


def test_a_number_of_rows_is_all_that_is_read(hub: Hub, config: DataConfig, documents: list[str]) -> None:
    assert texts(config, "hub:owner/name:en:validation[:7]") == documents[:7]
    assert hub.asked == [("owner/name", "en", "validation", True)]
    assert hub.read <= 8


def test_progress_is_reported(hub: Hub, config: DataConfig) -> None:
    seen: list[tuple[str, float]] = []
    _hub.hub_source("hub:owner/name:train[:20]", config, lambda phase, share: seen.append((phase, share)))
    assert [share for _, share in seen] == [n / 20 for n in range(1, 21)]
    assert {phase for phase, _ in seen} == {"downloading"}


def test_the_column_must_be_there(hub: Hub, config: DataConfig) -> None:
    with pytest.raises(ValueError, match="hub:owner/name:train has the columns n, body and no text_column"):
        texts(DataConfig(cache_dir=config.cache_dir))


def test_without_a_network_the_name_is_refused(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'hub:owner/name:train' cannot be read from the Hub") as caught:
        prepare(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("hub:name", HubName("name", None, "train", None)),
        ("hub:owner/name:en", HubName("owner/name", "en", "train", None)),
        ("hub:owner/name:validation", HubName("owner/name", None, "validation", None)),
        ("hub:owner/name:extra[:5]", HubName("owner/name", None, "extra", 5)),
        ("hub:owner/name:CC-MAIN-2024-10:train", HubName("owner/name", "CC-MAIN-2024-10", "train", None)),
    ],
)
def test_names_are_read(spec: str, parsed: HubName) -> None:
    assert HubName.parse(spec) == parsed
    assert HubName.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "spec", ["hub:", "hub:a/b/c", "hub:a/b:", "hub:../up", "hub:a:b:c:d", "hub:a:train[:0]"]
)
def test_other_forms_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="dataset_path"):
        HubName.parse(spec)
