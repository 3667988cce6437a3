"""A model of a run, of a checkpoint or of any Hugging Face folder, evaluated on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aiether.adaptive import set_halt_q
from aiether.data import DataConfig, Progress, TokenFile, TokenMixture, TokenWindows, prepare, whole_text
from aiether.data.prepare import silent
from aiether.data.tokenizer import TextTokenizer, load_tokenizer
from aiether.evaluation import (
    Bucket,
    ConformanceReport,
    LossSums,
    bits_per_byte,
    check_conformance,
    count_forward_flops,
    cut_windows,
    perplexity,
    sum_losses,
    text_windows,
)
from aiether.evaluation.loss import Counted

from . import _format as fmt
from .config import read_config
from .generate import find_device, find_model, load_model, run_of, tokenizer_of_run
from .run_folder import read_record

LONGEST = 4096
"""Context by default at most: models that allow a hundred thousand tokens were seldom trained on as many."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "encoder.json")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    model: the folder of the weights.
    source: what the text is.
    loss: mean per predicted token, in nats, unclamped.
    perplexity: its exponential; infinite where that leaves the range of a float.
    bits_per_byte: None where the text behind the tokens is not known.
    tokens: how many were predicted.
    windows, context_length, stride: in what; `stride` None: windows side by side.
    forward_flops_per_token: of a forward pass over one window, head and attention included, as it ran.
    tokens_per_s: tokens through the model, those included that do not count.
    device, dtype: where and in what.
    buckets: the loss by how many tokens stand before the one predicted.
    extra: what the model itself counts (`compute_figures`), as realised capacity or iterations.
    """

    model: str
    source: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    windows: int
    context_length: int
    stride: int | None
    forward_flops_per_token: float
    tokens_per_s: float
    device: str
    dtype: str
    buckets: tuple[Bucket, ...]
    extra: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN: None instead."""
        return _finite(asdict(self))

    def __str__(self) -> str:
        bits = "unknown (tokens without their text)" if self.bits_per_byte is None else ""
        apart = f", {self.stride} apart" if self.stride is not None else ""
        windows = (
            f"{self.windows:,} window{'s' if self.windows > 1 else ''} of {self.context_length:,}{apart}"
        )
        rows = {
            "model": self.model,
            "text": self.source,
            "loss": f"{self.loss:.4f} nats per token",
            "perplexity": f"{self.perplexity:.4g}",
            "bits per byte": bits or f"{self.bits_per_byte:.4f}",
            "tokens": f"{self.tokens:,} in {windows}",
            "FLOPs per token": f"{fmt.scientific(self.forward_flops_per_token)}, forward, head and attention",
            "speed": f"{self.tokens_per_s:,.0f} tokens/s on {self.device}, {self.dtype}",
            **{key: f"{value:.4g}" for key, value in self.extra.items()},
        }
        width = max(map(len, rows))
        lines = [f"{key:{width}}  {value}" for key, value in rows.items()]
        return "\n".join([*lines, "", "loss by tokens before:", *map(_bucket_line, self.buckets)])


@dataclass(frozen=True)
class _Text:
    """What is evaluated on."""

    tokens: TokenFile | TokenMixture
    bytes_per_token: float | None
    source: str
    context_length: int | None = None


def evaluate(
    path: str | Path,
    *,
    dataset_path: str | None = None,
    text_column: str = "text",
    token_dtype: Any = None,
    context_length: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    bf16: bool = False,
    halt_q: float | None = None,
    tokenizer: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """The loss of a model over windows of a text, every predicted token weighing the same.

    `path` is as for `generate`. Documents are joined with end-of-text tokens as in training; windows are
    never padded (see `cut_windows`), logits and labels are shifted once, the loss is not clamped.

    Parameters
    ----------
    dataset_path: one source of any kind that training takes, all of it. None: the validation split of the run
        that `path` is or lies in.
    context_length: tokens of a window. None: the run's with its own split, else the model's, at most
        `LONGEST`.
    stride: None: windows side by side. Else as far apart, and only tokens that are new count.
    windows: at most so many, spread evenly.
    bf16: weights as they are stored, and autocast to bfloat16. Without it everything is float32.
    halt_q: how long a model with latent reasoning thinks, as for `generate`. None: as it was trained with.
    text_column, token_dtype, tokenizer: of `dataset_path`, as in training; the tokenizer for a `path` that
        has none.
    cache_dir: where tokens are kept. None: where the run keeps them, else ~/.cache/aiether.
    progress: told what is done and the share of it.

    Raises
    ------
    ValueError
        For a folder without a model, a text that cannot be used, a tokenizer that is not the model's, a run
        whose data has changed, settings out of range, too little memory, and a loss that is NaN.
    """
    report = progress or silent
    _validate(dataset_path, (tokenizer, token_dtype), batch_size, windows)
    model_dir, target = find_model(path), find_device(device)
    model = _loaded(model_dir, trust_remote_code, halt_q)
    model = (model if bf16 else model.float()).to(target).eval()
    if dataset_path is None:
        text = _own_split(path, cache_dir, report)
    else:
        config = DataConfig(
            dataset_path=dataset_path, text_column=text_column, token_dtype=token_dtype, cache_dir=cache_dir
        )
        whole = whole_text(config, text_tokenizer(path, model_dir, tokenizer), report)
        text = _Text(whole.tokens, whole.bytes_per_token, whole.source)
    length = context_of(model, text.context_length if context_length is None else context_length)
    count, read = _windows(text.tokens, length, stride, windows)
    first, _ = next(_checked(read, model, count, silent))
    flops = count_forward_flops(model, first[None].to(target))  # the device is warm after it
    sums, elapsed_s, figures = _measured(
        model, lambda: _checked(read, model, count, report), batch_size, bf16
    )
    bits = None if text.bytes_per_token is None else bits_per_byte(sums.loss, 1, text.bytes_per_token)
    return Evaluation(
        model=str(model_dir),
        source=text.source,
        loss=sums.loss,
        perplexity=perplexity(sums.loss),
        bits_per_byte=bits,
        tokens=sums.tokens,
        windows=sums.windows,
        context_length=len(first),
        stride=stride,
        forward_flops_per_token=flops / len(first),
        tokens_per_s=sums.inputs / elapsed_s,
        device=target.type,
        dtype="bfloat16" if bf16 else "float32",
        buckets=sums.buckets(),
        extra=figures,
    )


def conformance(
    path: str | Path,
    *,
    length: int | None = None,
    halt_q: float | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> ConformanceReport:
    """The conformance kit on the model of a folder, in float32; see `check_conformance`.

    Raises ValueError as `evaluate`, and for a length that the model does not take.
    """
    model_dir, target = find_model(path), find_device(device)
    model = _loaded(model_dir, trust_remote_code, halt_q)
    return check_conformance(model.float().to(target), length=length)


def _loaded(model_dir: Path, trust_remote_code: bool, halt_q: float | None) -> Any:
    model = load_model(model_dir, trust_remote_code=trust_remote_code)
    if halt_q is not None:
        set_halt_q(model, halt_q)
    return model


def _own_split(path: str | Path, cache_dir: str | None, report: Progress) -> _Text:
    """The validation split of the run that a path is or lies in."""
    run_dir = run_of(path)
    if run_dir is None:
        raise ValueError(
            f"{str(path)!r} belongs to no run, which would have a validation split; give --dataset_path"
        )
    config = read_config(run_dir / "config.yaml")
    data = prepare(replace(config, cache_dir=cache_dir or config.cache_dir), report)
    record = run_dir / "environment.json"
    advice = "restore it from a copy, or give --dataset_path"
    trained_on = read_record(record, lambda read: str(read["data"]["fingerprint"]), advice)
    if data.fingerprint != trained_on:
        raise ValueError(
            f"the data of {str(run_dir)!r} has changed since the run started, and its split with it: restore "
            f"{data.source}, or give --dataset_path"
        )
    source = f"validation split of {data.source}"
    return _Text(data.validation, data.bytes_per_token, source, config.context_length)


def text_tokenizer(path: str | Path, model_dir: Path, given: str | None) -> TextTokenizer | None:
    """The tokenizer given, else the model folder's, else that of the run's data; None where there is none."""
    if given is not None:
        return load_tokenizer(given)
    if any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(str(model_dir))
    of_run = tokenizer_of_run(Path(path))
    return None if of_run is None else load_tokenizer(str(of_run))


def context_of(model: Any, wanted: int | None) -> int:
    """Tokens of a window: as wanted (ValueError if too many), else the model's, at most `LONGEST`."""
    most = getattr(model.config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else None
    if wanted is None:
        return min(most or LONGEST, LONGEST)
    if most is not None and wanted > most:
        raise ValueError(f"context_length is {wanted}; the model takes at most {most} tokens")
    return wanted


Read = Callable[[], Iterator[Counted]]


def _windows(
    tokens: TokenFile | TokenMixture, length: int, stride: int | None, number: int | None
) -> tuple[int, Read]:
    """How many windows there are, and what reads them one by one from the first."""
    if isinstance(tokens, TokenFile):
        places = cut_windows(len(tokens), length, stride, number)
        return len(places), lambda: text_windows(tokens, places)
    if stride is not None:
        raise ValueError(
            "stride is for one text, and the run's data is mixed of several: name one of them with "
            "--dataset_path"
        )
    mixed = TokenWindows(tokens, length, seed=None, num_windows=number)
    return len(mixed), lambda: ((mixed[index]["input_ids"], 1) for index in range(len(mixed)))


def _checked(read: Read, model: Any, count: int, report: Progress) -> Iterator[Counted]:
    """The windows, once their ids are known to be in the model's vocabulary; tells how far they are."""
    for number, (ids, first) in enumerate(read()):
        check_ids(ids, model)
        report("evaluating", number / count)
        yield ids, first


def check_ids(ids: torch.Tensor, model: Any) -> None:
    """Raise ValueError for ids that are not in the model's vocabulary."""
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise ValueError(
            f"the text holds the id {int(ids.max())}, the model's vocabulary {rows} entries: they do not "
            "belong together; name the model's own tokenizer with --tokenizer"
        )


def _measured(
    model: Any, read: Read, batch_size: int, bf16: bool
) -> tuple[LossSums, float, dict[str, float]]:
    """The sums over all windows, the seconds that they took, and what the model has counted meanwhile."""
    reset, figures = (getattr(model, name, dict) for name in ("reset_compute_figures", "compute_figures"))
    reset()
    started = time.perf_counter()
    try:
        sums = sum_losses(model, read(), batch_size=batch_size, bf16=bf16)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"there is too little memory for {batch_size} windows at once; choose a smaller batch_size, or "
            "context_length"
        ) from error
    elapsed_s = time.perf_counter() - started
    return sums, elapsed_s, {name: float(value) for name, value in figures().items()}


def _validate(
    dataset_path: str | None, of_a_text: tuple[Any, ...], batch_size: int, windows: int | None
) -> None:
    if dataset_path is None and any(value is not None for value in of_a_text):
        raise ValueError(
            "tokenizer and token_dtype are about a text: give dataset_path too; a run's own split is tokens "
            "already"
        )
    for name, value in (("batch_size", batch_size), ("windows", windows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bucket_line(bucket: Bucket) -> str:
    stretch = (
        f"{bucket.start:,}" if bucket.stop == bucket.start + 1 else f"{bucket.start:,}-{bucket.stop - 1:,}"
    )
    return f"  {stretch:>13}  {bucket.loss:.4f}  ({bucket.tokens:,} tokens)"
