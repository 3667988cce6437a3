"""A model beside the one that it was made of: where that one comes from, and what is told about both."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aiether.data._reach import no_answer
from aiether.data.tokenizer import TextTokenizer
from aiether.evaluation import Bucket, Comparison, perplexity

from .generate import find_model

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_HUB_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "vocab.bpe", "*.model")
_SPELLING = ("model", "normalizer", "pre_tokenizer")
_ADVICE = "evaluate each alone and compare bits per byte"


@dataclass(frozen=True)
class Against:
    """The base model over the same windows.

    Attributes
    ----------
    base: its folder or name.
    loss, perplexity, bits_per_byte: as in `Evaluation`.
    loss_difference: the model's loss less the base's; above 0 the model is worse.
    standard_error: of the difference, paired over windows; None for a single one.
    kl: D(base || model), mean per predicted token, in nats.
    buckets, kl_buckets: the base's loss, and the divergence, by how many tokens stand before.
    """

    base: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    loss_difference: float
    standard_error: float | None
    kl: float
    buckets: tuple[Bucket, ...]
    kl_buckets: tuple[Bucket, ...]

    heads: ClassVar[tuple[str, ...]] = ("base's loss", "base's ppl.", "KL")

    @classmethod
    def of(cls, base: str, found: Comparison, bits_per_byte: float | None) -> Against:
        """The figures of a comparison."""
        return cls(
            base=base,
            loss=found.base.loss,
            perplexity=perplexity(found.base.loss),
            bits_per_byte=bits_per_byte,
            loss_difference=found.difference,
            standard_error=found.standard_error,
            kl=found.kl,
            buckets=found.base.buckets(),
            kl_buckets=found.divergences.buckets(),
        )

    def rows(self) -> dict[str, str]:
        """What is printed below the model's own rows."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        error = "one window, no error" if self.standard_error is None else f"± {self.standard_error:.4f}"
        return {
            "base": self.base,
            "base's loss": f"{self.loss:.4f} nats per token, perplexity {self.perplexity:.4g}{bits}",
            "difference": f"{self.loss_difference:+.4f} nats per token, {error} (paired over windows)",
            "KL": f"{self.kl:.3g} nats per token, D(base || model)",
        }

    def by_place(self) -> list[tuple[str, ...]]:
        """One row of cells per bucket, under `heads`."""
        pairs = zip(self.buckets, self.kl_buckets, strict=True)
        return [(f"{of.loss:.4f}", f"{of.perplexity:.4g}", f"{kl.loss:.3g}") for of, kl in pairs]


def base_folder(name: str) -> Path:
    """The folder of a model: `name` as for `generate`, or downloaded once from the Hub, safetensors alone.

    Raises ValueError for what is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir() or not _HUB_NAME.fullmatch(name):
        return find_model(path)
    import huggingface_hub  # needed for a name alone

    away = no_answer(name, "model")
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=list(_HUB_PATTERNS), local_files_only=away is not None
        )
    except Exception as error:  # of several libraries: no such name, no rights, not in the cache
        reason = away or error
        raise ValueError(
            f"{name!r} is not a folder, and as a name on the Hub it cannot be downloaded "
            f"({(str(reason) or type(reason).__name__).splitlines()[0]}); check the name and the network, or "
            "name a folder that save_pretrained wrote"
        ) from error
    return find_model(found)


def check_same(
    name: str, model: Any, base: Any, spoken: TextTokenizer | None, spoken_by_base: TextTokenizer | None
) -> None:
    """Raise ValueError unless a base has the model's vocabulary, and its tokenizer where both have one."""
    rows, base_rows = (each.get_input_embeddings().num_embeddings for each in (model, base))
    if rows != base_rows:
        raise ValueError(
            f"the model's vocabulary has {rows} entries, that of {name!r} {base_rows}: token by token they "
            f"cannot be compared; {_ADVICE}"
        )
    if spoken is not None and spoken_by_base is not None and _spelling(spoken) != _spelling(spoken_by_base):
        raise ValueError(
            f"the tokenizer of {name!r} is not the model's: the same text is other tokens to each; {_ADVICE}"
        )


def _spelling(tokenizer: TextTokenizer) -> tuple[Any, ...]:
    """What decides which ids a text becomes, as both are written by this version of the library."""
    written = json.loads(tokenizer.backend.to_str())
    return tokenizer.backend.get_vocab(with_added_tokens=True), *(written.get(part) for part in _SPELLING)
