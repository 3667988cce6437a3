from __future__ import annotations

from pathlib import Path

import pytest

from .corpus import make_document


@pytest.fixture
def documents() -> list[str]:
    return [make_document(seed) for seed in range(60)]


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    """A folder of sixty text files, one document each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:03d}.txt").write_text(document, encoding="utf-8")
    return folder
