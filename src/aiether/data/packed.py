"""What prepared data is to the rest of the house."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiether.data.mixture import TokenMixture
from aiether.data.tokens import TokenFile


@dataclass(frozen=True)
class PackedData:
    """Tokens of both sides, and what is needed to read the numbers of a run.

    Attributes:
        train, validation: memory-mapped tokens, each document followed by the end-of-text token; of several
            sources, a mixture.
        tokenizer_dir: a folder that `AutoTokenizer` loads; None for a tokenised dataset without tokenizer.
        vocab_size: number of token ids a model needs.
        eos_token_id: the token between documents; None where `tokenizer_dir` is.
        fingerprint: SHA-256 over the tokens of both sides and the tokenizer: equal data, equal fingerprint.
        source: what the data is, for people.
        num_documents: on both sides together; None where documents are not told apart (.bin files).
        train_bytes, validation_bytes: UTF-8 bytes of text; None where the text is not known.
        bytes_per_token: UTF-8 bytes of text a token of the validation side stands for, of several sources by
            their shares; None where the text is not known. End-of-text tokens are tokens without bytes.
    """

    train: TokenFile | TokenMixture
    validation: TokenFile | TokenMixture
    tokenizer_dir: Path | None
    vocab_size: int
    eos_token_id: int | None
    fingerprint: str
    source: str
    num_documents: int | None
    train_bytes: int | None
    validation_bytes: int | None
    bytes_per_token: float | None

    @property
    def train_tokens(self) -> int:
        """Tokens of the training side."""
        return len(self.train)

    @property
    def validation_tokens(self) -> int:
        """Tokens of the validation side."""
        return len(self.validation)
