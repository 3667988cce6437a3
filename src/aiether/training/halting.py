"""The second stage of a finished model: its halting head taught on a text, the rest as it was."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiether.adaptive import LahrForCausalLM, renew_halting_head, set_halt_q, train_halting_head
from aiether.data import DataConfig, Progress, TokenFile, whole_text
from aiether.data.prepare import silent
from aiether.evaluation import cut_windows, sum_losses, text_windows
from aiether.evaluation.windows import Window
from aiether.integrations import whole_folder, without_progress_bars

from .evaluate import TOKENIZER_FILES, check_ids, context_of, text_tokenizer
from .generate import find_device, find_model, load_model, tokenizer_of_run

THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""The values of halt_q that are tried."""
HELD_OUT, MOST_HELD_OUT = 0.1, 64
"""Share of the text's windows, at its end, that the head is not taught on; and how many at most."""
_BESIDE_TOKENIZER = ("special_tokens_map.json", "merges.txt", "vocab.bpe", "added_tokens.json")


@dataclass(frozen=True)
class AtThreshold:
    """What a model does at one `halt_q`: loss in nats per token, mean iterations."""

    halt_q: float
    loss: float
    iterations: float


@dataclass(frozen=True)
class TaughtHalting:
    """What a second stage came to.

    Attributes
    ----------
    path: the new model folder.
    head_losses: the head's binary cross-entropy, batch by batch, in nats.
    windows: held-out windows behind `rows`.
    rows: one for each of `THRESHOLDS`.
    """

    path: Path
    head_losses: tuple[float, ...]
    windows: int
    rows: tuple[AtThreshold, ...]

    def __str__(self) -> str:
        few = max(1, len(self.head_losses) // 10)
        first, last = (sum(part) / few for part in (self.head_losses[:few], self.head_losses[-few:]))
        lines = [
            f"{self.path}: {len(self.head_losses)} batches, "
            f"the head's cross-entropy {first:.4f} -> {last:.4f}",
            f"on {self.windows} held-out windows:",
            "halt_q    loss  iterations",
        ]
        return "\n".join(
            [*lines, *(f"{r.halt_q:6.2f}  {r.loss:.4f}  {r.iterations:10.2f}" for r in self.rows)]
        )


def teach_halting(
    path: str | Path,
    *,
    dataset_path: str,
    output_dir: str | Path | None = None,
    batches: int = 200,
    batch_size: int = 8,
    lr: float = 0.01,
    tau: float = 0.01,
    context_length: int | None = None,
    text_column: str = "text",
    tokenizer: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> TaughtHalting:
    """Teach a new halting head on the frozen model of a run or folder, and write both as a new folder.

    The head learns from windows of a text, drawn without repetition as long as there are some; the last ones
    are held out. It begins untrained, whatever halting the model was trained with; computed in float32.

    Parameters
    ----------
    path: as for `generate`.
    output_dir: a folder that does not exist yet. None: `path` with -halting behind it.
    batches, batch_size: optimizer steps, and windows of each.
    lr, tau: see `train_halting_head`.
    context_length, text_column, tokenizer, cache_dir: as for `evaluate`.

    Raises
    ------
    ValueError
        For a model without a latent block or with one iteration, an output folder that exists, too little
        text, text that is not in the model's tokens, settings out of range, and too little memory.
    """
    _validate(batches, batch_size, lr, tau)
    report, target = progress or silent, find_device(device)
    model_dir = find_model(path)
    directory = _new_folder(path, output_dir)
    model = load_model(model_dir)
    if not isinstance(model, LahrForCausalLM):
        raise ValueError(
            f"{str(model_dir)!r} is a {type(model).__name__}, which has no latent block: train one with "
            "--arch lahr"
        )
    renew_halting_head(model)
    config = DataConfig(dataset_path=dataset_path, text_column=text_column, cache_dir=cache_dir)
    tokens = whole_text(config, text_tokenizer(path, model_dir, tokenizer), report).tokens
    taught, held_out = _two_parts(tokens, context_of(model, context_length), batch_size)
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.float().to(target).eval()  # type: ignore[arg-type]
    try:
        drawn = _Batches(tokens, taught, batches, batch_size, seed, model, report)
        losses = train_halting_head(model, drawn, lr=lr, tau=tau)  # type: ignore[arg-type]
        if not all(map(math.isfinite, losses)):
            raise ValueError("the model's losses are not finite: its training diverged; take an earlier one")
        with whole_folder(directory) as folder:
            _write(model, stored, folder)
            copy_tokenizer(path, model_dir, tokenizer, folder)
            rows = _rows(model.float(), tokens, held_out, batch_size)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"there is too little memory for {batch_size} windows at once; choose a smaller batch_size, or "
            "context_length"
        ) from error
    return TaughtHalting(directory, tuple(losses), len(held_out), rows)


@dataclass(frozen=True)
class _Batches:
    """The batches that the head is taught on; its length lets the learning rate fall to 0."""

    tokens: TokenFile
    places: tuple[Window, ...]
    number: int
    batch_size: int
    seed: int
    model: Any
    report: Progress

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        left: list[int] = []
        for number in range(self.number):
            while len(left) < self.batch_size:
                left += torch.randperm(len(self.places), generator=generator).tolist()
            drawn, left = left[: self.batch_size], left[self.batch_size :]
            windows = text_windows(self.tokens, (self.places[index] for index in drawn))
            ids_BT = torch.stack([ids for ids, _ in windows])
            check_ids(ids_BT, self.model)
            self.report("teaching", number / self.number)
            yield {"input_ids": ids_BT.to(self.model.device)}


def _two_parts(
    tokens: TokenFile, length: int, batch_size: int
) -> tuple[tuple[Window, ...], tuple[Window, ...]]:
    """The windows to learn from, and those at the end that are held out."""
    places = cut_windows(len(tokens), length)
    held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(places))))
    if len(places) - held_out < batch_size:
        raise ValueError(
            f"the text has {len(places)} windows of {length} tokens, of which {held_out} are held out: too "
            f"few for batches of {batch_size}; give more text, a smaller batch_size or context_length"
        )
    return places[:-held_out], places[-held_out:]


def _rows(
    model: LahrForCausalLM, tokens: TokenFile, places: tuple[Window, ...], batch_size: int
) -> tuple[AtThreshold, ...]:
    rows: list[AtThreshold] = []
    for q in THRESHOLDS:
        set_halt_q(model, q)
        model.reset_compute_figures()
        loss = sum_losses(model, text_windows(tokens, places), batch_size=batch_size).loss
        rows.append(AtThreshold(q, loss, model.compute_figures()["iterations"]))
    return tuple(rows)


def _write(model: LahrForCausalLM, stored: dict[str, torch.dtype], folder: Path) -> None:
    """The model in the types that it was stored in."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(stored[name])
    with without_progress_bars():
        model.save_pretrained(folder)


def copy_tokenizer(path: str | Path, model_dir: Path, given: str | None, folder: Path) -> None:
    """The tokenizer that the text was read with, where it lies on this disk."""
    source = Path(given) if given is not None else model_dir
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
        return
    if given is None and not any((source / name).is_file() for name in TOKENIZER_FILES):
        source = tokenizer_of_run(Path(path)) or source
    for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _new_folder(path: str | Path, output_dir: str | Path | None) -> Path:
    place = Path(path).resolve()
    directory = Path(output_dir) if output_dir is not None else place.with_name(f"{place.name}-halting")
    if directory.exists():
        raise ValueError(f"{str(directory)!r} exists already: name a new folder with --output_dir")
    return directory


def _validate(batches: int, batch_size: int, lr: float, tau: float) -> None:
    for name, value in (("batches", batches), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be greater than 0")
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is {tau}; it must be at least 0: nats that an iteration has to gain")
