"""A model of a run, of a checkpoint or of any Hugging Face folder, evaluated on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aiether.adaptive import set_halt_q
from aiether.data import DataConfig, Progress, TokenFile, TokenMixture, TokenWindows, prepare, whole_text
from aiether.data.prepare import silent
from aiether.data.tokenizer import TextTokenizer, load_tokenizer
from aiether.data.whole import WholeText
from aiether.evaluation import (
    Bucket,
    ConformanceReport,
    LossSums,
    Parity,
    bits_per_byte,
    check_conformance,
    compare,
    count_forward_flops,
    cut_windows,
    decode_parity,
    perplexity,
    sum_losses,
    text_windows,
    watch_peak,
)
from aiether.evaluation.loss import Counted, check_bf16

from . import _format as fmt
from .against import Against, base_folder, check_same
from .config import read_config
from .generate import find_device, find_model, load_model, run_of, tokenizer_of_run, toroidal_base
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
    peak_memory_bytes: the most that CUDA has held meanwhile, weights included; None elsewhere.
    decode_parity: how far decoding from the cache is from one pass; None without a cache, or not asked for.
    device, dtype: where and in what.
    buckets: the loss by how many tokens stand before the one predicted.
    extra: what the model itself counts (`compute_figures`), as realised capacity or iterations.
    against: the same of a base model; None where none was named.
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
    peak_memory_bytes: int | None
    decode_parity: Parity | None
    device: str
    dtype: str
    buckets: tuple[Bucket, ...]
    extra: Mapping[str, float]
    against: Against | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN: None instead."""
        found = asdict(self)
        shown = [(found["buckets"], self.buckets)]
        if self.against is not None:
            shown.append((found["against"]["buckets"], self.against.buckets))
        for rows, buckets in shown:
            for row, bucket in zip(rows, buckets, strict=True):
                row["perplexity"] = bucket.perplexity
        return _finite(found)

    def __str__(self) -> str:
        bits = "unknown (tokens without their text)"
        if self.bits_per_byte is not None:
            bits = f"{self.bits_per_byte:.4f}"
        apart = f", {self.stride} apart" if self.stride is not None else ""
        windows = (
            f"{self.windows:,} window{'s' if self.windows > 1 else ''} of {self.context_length:,}{apart}"
        )
        rows = {
            "model": self.model,
            "text": self.source,
            "loss": f"{self.loss:.4f} nats per token",
            "perplexity": f"{self.perplexity:.4g}",
            "bits per byte": bits,
            "tokens": f"{self.tokens:,} in {windows}",
            "FLOPs per token": f"{fmt.scientific(self.forward_flops_per_token)}, forward, head and attention",
            "speed": f"{self.tokens_per_s:,.0f} tokens/s on {self.device}, {self.dtype}",
            **self._costs(),
            **{key: f"{value:.4g}" for key, value in self.extra.items()},
        }
        if self.against is not None:
            rows |= self.against.rows()
        width = max(map(len, rows))
        lines = [f"{key:{width}}  {value}" for key, value in rows.items()]
        return "\n".join([*lines, "", *self._by_place()])

    def _costs(self) -> dict[str, str]:
        rows = {"peak memory": f"not counted on {self.device}"}
        if self.peak_memory_bytes is not None:
            rows["peak memory"] = f"{self.peak_memory_bytes / 2**30:.2f} GiB, weights included"
        if (parity := self.decode_parity) is not None:
            rows["decode parity"] = (
                f"{parity.difference:.1e} at most between logits from the cache and at once (up to "
                f"{parity.scale:.3g}), {parity.tokens} tokens"
            )
        return rows

    def _by_place(self) -> Iterator[str]:
        heads = ["tokens before", "tokens", "loss", "perplexity"]
        beside: Sequence[Sequence[str]] = [()] * len(self.buckets)
        if self.against is not None:
            heads, beside = [*heads, *self.against.heads], self.against.by_place()
        yield "  ".join(f"{head:>13}" for head in heads)
        for bucket, others in zip(self.buckets, beside, strict=True):
            cells = [_stretch(bucket), f"{bucket.tokens:,}", f"{bucket.loss:.4f}", f"{bucket.perplexity:.4g}"]
            yield "  ".join(f"{cell:>13}" for cell in [*cells, *others])


@dataclass(frozen=True)
class _Text:
    """What is evaluated on."""

    tokens: TokenFile | TokenMixture
    bytes_per_token: float | None
    source: str
    context_length: int | None = None

    @classmethod
    def of(cls, whole: WholeText) -> _Text:
        """All of a source."""
        return cls(whole.tokens, whole.bytes_per_token, whole.source)

    def bits_per_byte(self, loss: float) -> float | None:
        """Of a mean loss per token in nats; None where the text is not known."""
        return None if self.bytes_per_token is None else bits_per_byte(loss, 1, self.bytes_per_token)


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
    against: str | None = None,
    parity_tokens: int = 64,
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
    against: a folder as `path`, or a name on the Hub: the model that this one was made of, or another with
        its tokenizer. The loss beside it and the divergence from it are measured in a pass of their own.
    parity_tokens: so many of the first window are decoded one by one as well; 0: none.
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
    _validate(dataset_path, (tokenizer, token_dtype), batch_size, windows, parity_tokens)
    model_dir, target = find_model(path), find_device(device)
    model = _loaded(model_dir, trust_remote_code, halt_q, bf16=bf16).to(target)
    check_bf16(model, bf16)
    base = None if against is None else _base(against, path, model, tokenizer, trust_remote_code, bf16)
    if dataset_path is None:
        text = _own_split(path, cache_dir, report)
    else:
        config = DataConfig(
            dataset_path=dataset_path, text_column=text_column, token_dtype=token_dtype, cache_dir=cache_dir
        )
        text = _Text.of(whole_text(config, text_tokenizer(path, model_dir, tokenizer), report))
    length = context_of(model, text.context_length if context_length is None else context_length)
    count, read = _windows(text.tokens, length, stride, windows)
    first, _ = next(_checked(read, model, count, silent))
    flops = count_forward_flops(model, first[None].to(target))  # the device is warm after it
    parity = _parity(model, first[:parity_tokens], bf16)
    found = _measured(model, lambda: _checked(read, model, count, report), batch_size, bf16)
    beside = None
    if base is not None:
        again = _checked(read, model, count, report, "comparing")
        with enough_memory(batch_size):
            both = compare(model, base.to(target), again, batch_size=batch_size, bf16=bf16)
        beside = Against.of(str(against), both, text.bits_per_byte(both.base.loss))
    return Evaluation(
        model=str(model_dir),
        source=text.source,
        loss=found.sums.loss,
        perplexity=perplexity(found.sums.loss),
        bits_per_byte=text.bits_per_byte(found.sums.loss),
        tokens=found.sums.tokens,
        windows=found.sums.windows,
        context_length=len(first),
        stride=stride,
        forward_flops_per_token=flops / len(first),
        tokens_per_s=found.sums.inputs / found.elapsed_s,
        peak_memory_bytes=found.peak_bytes,
        decode_parity=parity,
        device=target.type,
        dtype="bfloat16" if bf16 else "float32",
        buckets=found.sums.buckets(),
        extra=found.figures,
        against=beside,
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
    return check_conformance(model.to(target), length=length)


def _loaded(
    model_dir: Path, trust_remote_code: bool, halt_q: float | None = None, *, bf16: bool = False
) -> Any:
    model = load_model(model_dir, trust_remote_code=trust_remote_code)
    if halt_q is not None:
        set_halt_q(model, halt_q)
    return (model if bf16 else model.float()).eval()


def _base(
    name: str, path: str | Path, model: Any, tokenizer: str | None, trust_remote_code: bool, bf16: bool
) -> Any:
    """The model to compare with, once it is known to speak the same tokens; still in ordinary memory."""
    folder = base_folder(name)
    spoken = text_tokenizer(path, find_model(path), tokenizer), text_tokenizer(name, folder, None)
    base = _loaded(folder, trust_remote_code, bf16=bf16)
    check_same(name, model, base, *spoken)
    return base


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
    if (base := toroidal_base(model_dir)) is not None:
        return load_tokenizer(base)
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


def _checked(
    read: Read, model: Any, count: int, report: Progress, phase: str = "evaluating"
) -> Iterator[Counted]:
    """The windows, once their ids are known to be in the model's vocabulary; tells how far they are."""
    for number, (ids, first) in enumerate(read()):
        check_ids(ids, model)
        report(phase, number / count)
        yield ids, first


def check_ids(ids: torch.Tensor, model: Any) -> None:
    """Raise ValueError for ids that are not in the model's vocabulary."""
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise ValueError(
            f"the text holds the id {int(ids.max())}, the model's vocabulary {rows} entries: they do not "
            "belong together; name the model's own tokenizer with --tokenizer"
        )


def _parity(model: Any, ids: torch.Tensor, bf16: bool) -> Parity | None:
    if not len(ids):
        return None
    try:
        return decode_parity(model, ids, bf16=bf16)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the model fails to decode from its cache ({reason}); --parity_tokens 0 leaves that out, and "
            "aiether evaluate --conformance says what does not hold"
        ) from error


class _Measured(NamedTuple):
    """The sums over all windows, the seconds and bytes that they took, and what the model itself counted."""

    sums: LossSums
    elapsed_s: float
    peak_bytes: int | None
    figures: dict[str, float]


def _measured(model: Any, read: Read, batch_size: int, bf16: bool) -> _Measured:
    reset, figures = (getattr(model, name, dict) for name in ("reset_compute_figures", "compute_figures"))
    reset()
    peak, started = watch_peak(model.device), time.perf_counter()
    with enough_memory(batch_size):
        sums = sum_losses(model, read(), batch_size=batch_size, bf16=bf16)
    elapsed_s = time.perf_counter() - started
    return _Measured(sums, elapsed_s, peak(), {name: float(value) for name, value in figures().items()})


@contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """A device without room becomes a ValueError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"there is too little memory for {batch_size} windows at once; choose a smaller batch_size, or "
            "context_length"
        ) from error


def _validate(
    dataset_path: str | None,
    of_a_text: tuple[Any, ...],
    batch_size: int,
    windows: int | None,
    parity_tokens: int,
) -> None:
    if dataset_path is None and any(value is not None for value in of_a_text):
        raise ValueError(
            "tokenizer and token_dtype are about a text: give dataset_path too; a run's own split is tokens "
            "already"
        )
    for name, value in (("batch_size", batch_size), ("windows", windows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if parity_tokens < 0:
        raise ValueError(f"parity_tokens is {parity_tokens}; it must be 0 (none) or more")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stretch(bucket: Bucket) -> str:
    last = bucket.stop - 1
    return f"{bucket.start:,}" if last == bucket.start else f"{bucket.start:,}-{last:,}"
