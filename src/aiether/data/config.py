"""What the data part of a run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-text token: the smallest byte-level vocabulary that can spell every text."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Attributes:
        dataset_path: a text file (plain, .gz, .xz, .zst), a folder, a glob, or a folder written by
            `datasets.Dataset.save_to_disk`. None: the source of Python's own standard library.
        text_column: the column that holds the text of a `save_to_disk` dataset.
        tokenizer: a tokenizer.json file or a Hugging Face tokenizer folder. None: a byte-level BPE is
            trained on the training side of the data.
        vocab_size: entries of the BPE that is trained (fewer if the data supports fewer).
        validation_fraction: share of the bytes, in whole documents, held out for validation.
        cache_dir: where prepared tokens are kept. None: ~/.cache/aiether.
    """

    dataset_path: str | None = None
    text_column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    validation_fraction: float = 0.02
    cache_dir: str | None = None

    def validate(self) -> None:
        """Raise ValueError for a value out of its range; paths are looked at when they are opened."""
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} "
                "entries (256 bytes and the end-of-text token); give a larger one"
            )
        if not 0.0 < self.validation_fraction <= 0.5:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; allowed is above 0 and at most 0.5; "
                "0.02 holds out one byte in fifty"
            )

    @property
    def cache_root(self) -> Path:
        """The folder under which prepared data is kept."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "aiether"
