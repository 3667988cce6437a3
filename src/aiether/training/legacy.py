"""The reference's arithmetic on a model of a folder, under its own name: see `aiether.evaluation.legacy`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aiether.evaluation.legacy import LINE_TOKENS, LegacyLoss, legacy_lines, legacy_loss

from .evaluate import check_ids, context_of, enough_memory, text_tokenizer
from .generate import find_device, find_model, load_model


@dataclass(frozen=True)
class LegacyEvaluation:
    """What `evaluate_legacy` found; none of its figures is called loss or perplexity."""

    model: str
    source: str
    found: LegacyLoss

    @property
    def legacy_exp(self) -> float:
        """exp of the legacy loss: what the reference's tables call PPL."""
        try:
            return math.exp(self.found.legacy_loss)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        exp = self.legacy_exp if math.isfinite(self.legacy_exp) else None
        return {
            "arithmetic": self.found.arithmetic,
            "model": self.model,
            "source": self.source,
            **asdict(self.found),
            "legacy_exp": exp,
        }

    def __str__(self) -> str:
        rows = {
            "model": self.model,
            "text": self.source,
            "legacy loss": f"{self.found.legacy_loss:.4f}",
            "its exponential": f"{self.legacy_exp:.6g}",
            "lines": f"{self.found.lines:,}",
            "padding": f"{self.found.padding_share:.1%} of what was predicted",
        }
        width = max(map(len, rows))
        return "\n".join([self.found.arithmetic, *(f"{key:{width}}  {row}" for key, row in rows.items())])


def evaluate_legacy(
    path: str | Path,
    *,
    dataset_path: str | None,
    lines: int | None = None,
    empty_lines: bool = False,
    double_shift: bool = False,
    context_length: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> LegacyEvaluation:
    """The reference's number for a model, in float32, to stand beside the reference's own rows only.

    Parameters
    ----------
    path, batch_size, device, tokenizer, trust_remote_code: as for `evaluate`.
    dataset_path: a text file, each line of which is a text.
    lines: the first so many. None: all.
    empty_lines: blank lines are lines too, of padding alone.
    double_shift: see `legacy_loss`.
    context_length: tokens that a line is cut or padded to. None: 256.

    Raises
    ------
    ValueError
        As `evaluate`, and for a text that is not a file of UTF-8 text.
    """
    for name, value in (("lines", lines), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    texts = legacy_lines(_text_of(dataset_path), empty=empty_lines)[:lines]
    model_dir, target = find_model(path), find_device(device)
    model = load_model(model_dir, trust_remote_code=trust_remote_code).float().to(target)
    spoken = text_tokenizer(path, model_dir, tokenizer)
    if spoken is None:
        raise ValueError(f"{str(path)!r} has no tokenizer: name one with --tokenizer")
    length = context_of(model, LINE_TOKENS if context_length is None else context_length)
    ids = spoken.encode(texts)
    check_ids(torch.tensor([spoken.eos_token_id, *(id for line in ids for id in line)]), model)
    with enough_memory(batch_size):
        found = legacy_loss(
            model,
            ids,
            pad_id=spoken.eos_token_id,
            line_tokens=length,
            double_shift=double_shift,
            batch_size=batch_size,
        )
    return LegacyEvaluation(str(model_dir), str(dataset_path), found)


def _text_of(dataset_path: str | None) -> str:
    if dataset_path is None or not Path(dataset_path).expanduser().is_file():
        raise ValueError(
            f"dataset_path is {dataset_path!r}; the legacy arithmetic reads the lines of one text file"
        )
    try:
        return Path(dataset_path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{dataset_path!r} is not UTF-8 text: name a plain text file") from error
