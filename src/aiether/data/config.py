"""What the data part of a run can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-text token: the smallest byte-level vocabulary that can spell every text."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Attributes:
        dataset_path: one source or several. A source is a file of text or of rows (JSON Lines, CSV, TSV,
            Parquet), plain or compressed (.gz, .xz, .zst); a folder of such files; a glob; a folder written
            by `datasets.Dataset.save_to_disk`; a .bin file of token ids or a folder with train.bin and
            val.bin; or hub:NAME[:CONFIG][:SPLIT]. None: the source of Python's own standard library.
        dataset_weights: shares of the training tokens, one a source. None: by size.
        text_column: the column that holds the text where a source has columns.
        token_dtype: the type of the ids in a .bin file. None: as the file beside it says, else uint16.
        tokenizer: a tokenizer.json file, a tokenizer folder (Hugging Face's, or GPT-2's encoder.json and
            vocab.bpe), or a name on the Hub. None: a byte-level BPE is trained on the training side.
        vocab_size: entries of the BPE that is trained (fewer if the data supports fewer).
        validation_fraction: share of the bytes, in whole documents, held out for validation.
        cache_dir: where prepared tokens are kept. None: ~/.cache/aiether.
    """

    dataset_path: str | tuple[str, ...] | None = None
    dataset_weights: tuple[float, ...] | None = None
    text_column: str = "text"
    token_dtype: Literal["uint16", "uint32"] | None = None
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

        self._validate_sources()

    def _validate_sources(self) -> None:
        if self.token_dtype not in (None, "uint16", "uint32"):
            raise ValueError(f"token_dtype is {self.token_dtype!r}; allowed are uint16 and uint32")
        if not self.dataset_paths:
            raise ValueError("dataset_path names no source; give at least one, or leave it out")
        weights, sources = self.dataset_weights, self.dataset_paths
        if weights is None:
            return
        if len(weights) != len(sources):
            raise ValueError(
                f"dataset_weights has {len(weights)} values for {len(sources)} source(s) in dataset_path; "
                "give one a source, in their order"
            )
        if not all(0.0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"dataset_weights is {', '.join(map(str, weights))}; each must be a number above 0; "
                "leave a source out of dataset_path instead of giving it no weight"
            )

    @property
    def dataset_paths(self) -> tuple[str | None, ...]:
        """The sources one by one; None is Python's standard library."""
        if self.dataset_path is None or isinstance(self.dataset_path, str):
            return (self.dataset_path,)
        return self.dataset_path

    @property
    def cache_root(self) -> Path:
        """The folder under which prepared data is kept."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "aiether"
