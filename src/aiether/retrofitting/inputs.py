"""What a retrofit asks for, and what it reads: a model, and windows of a text."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from aiether.data import DataConfig, Progress, TokenFile, whole_text
from aiether.data._reach import no_answer
from aiether.evaluation import cut_windows
from aiether.evaluation.windows import Window
from aiether.integrations import without_progress_bars
from aiether.toroidal import ToroidalSettings, is_toroidal
from aiether.training.evaluate import context_of, text_tokenizer
from aiether.training.generate import find_device, find_model

from .config import TuneConfig


@dataclass(frozen=True)
class RetrofitJob:
    """What a retrofit asks for.

    Attributes
    ----------
    model: a model folder, a run's folder (its final model), or a name on the Hub.
    layers: which; None: those that `suggest_layers` finds.
    suggest_layers: how many of the cheapest, by measurement.
    train_size, val_size: windows of the text to train on, and at its end, held out, to evaluate on. None: all
        but the last, and a tenth, at most 64.
    epochs: over the training windows; None: as many steps as `tuning` says.
    """

    model: str
    dataset_path: str
    output_dir: str
    layers: tuple[int, ...] | None = None
    suggest_layers: int | None = None
    settings: ToroidalSettings = field(default_factory=ToroidalSettings)
    tuning: TuneConfig = field(default_factory=TuneConfig)
    train_size: int | None = None
    val_size: int | None = None
    epochs: float | None = None
    context_length: int | None = None
    text_column: str = "text"
    tokenizer: str | None = None
    cache_dir: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("suggest_layers", 1), ("train_size", 1), ("val_size", 1), ("context_length", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"{name} is {value}: it must be at least {least}; leave it out for the default"
                )
        if self.layers is not None and self.suggest_layers is not None:
            raise ValueError("layers and suggest_layers are both given: name the layers, or have them chosen")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(
                f"epochs is {self.epochs}: it must be greater than 0; leave it out to count in steps"
            )

    @property
    def weights(self) -> str:
        """The folder of the weights, or the name on the Hub."""
        return str(find_model(self.model)) if Path(self.model).is_dir() else self.model


@dataclass(frozen=True)
class TextWindows:
    """The tokens, the windows of them to train on, and those at the end that are held out."""

    tokens: TokenFile
    train: tuple[Window, ...]
    held_out: tuple[Window, ...]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.train[0].stop - self.train[0].start

    def fingerprint(self) -> str:
        """SHA-256 of the tokens to train on: a text may be another under the same name."""
        return hashlib.sha256(self.tokens[self.train[0].start : self.train[-1].stop].tobytes()).hexdigest()


def load_base(job: RetrofitJob) -> Any:
    """The model, in the types that it is stored in, on its device, in evaluation mode.

    Raises
    ------
    ValueError
        For a folder that holds a model with toroidal layers, and a name that is no folder and not to be had.
    """
    if Path(job.weights).is_dir() and is_toroidal(job.weights):
        raise ValueError(
            f"{job.model!r} holds a model with toroidal layers already: begin from the model that it was "
            "made of"
        )
    away = None if Path(job.weights).is_dir() else no_answer(job.weights, "model")  # without many retries
    try:
        with without_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(
                job.weights,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=job.trust_remote_code,
                local_files_only=away is not None,
            )
    except OSError as error:
        if away is None:
            raise
        raise ValueError(
            f"{job.model!r} is not a folder, and as a name on the Hub it cannot be had "
            f"({(str(away) or type(away).__name__).splitlines()[0]}): check the name and the network"
        ) from error
    return model.to(find_device(job.device)).eval()


def read_windows(job: RetrofitJob, model: Any, say: Progress) -> TextWindows:
    """The windows of the job's text.

    Raises
    ------
    ValueError
        For a text that cannot be used, or is too short.
    """
    config = DataConfig(dataset_path=job.dataset_path, text_column=job.text_column, cache_dir=job.cache_dir)
    tokenizer = text_tokenizer(job.model, Path(job.weights), job.tokenizer or _own_tokenizer(job.model))
    tokens = whole_text(config, tokenizer, say).tokens
    places = cut_windows(len(tokens), context_of(model, job.context_length))
    held = min(64, max(1, len(places) // 10)) if job.val_size is None else job.val_size
    train = len(places) - held if job.train_size is None else job.train_size
    if train < 1 or train + held > len(places):
        raise ValueError(
            f"the text has {len(places)} windows: too few for {max(train, 1)} to train on and {held} to "
            "evaluate on; give more text, or a smaller train_size, val_size or context_length"
        )
    return TextWindows(tokens, places[:train], places[-held:])


def _own_tokenizer(model: str) -> str | None:
    """A name on the Hub has its tokenizer there."""
    return None if Path(model).is_dir() else model
