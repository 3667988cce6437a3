"""The job: a model and a text in, a retrofitted and tuned model out; stopped, it goes on where it was."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiether.data import Progress
from aiether.data.prepare import silent
from aiether.evaluation import sum_losses, text_windows
from aiether.integrations import hold, without_progress_bars, write_json
from aiether.toroidal import Places, attention_modules, check_conversion, retrofit, torus_terms
from aiether.toroidal.architecture import head_dim_of
from aiether.toroidal.attention import choose_backend
from aiether.toroidal.storage import RECORD
from aiether.training._format import duration
from aiether.training.evaluate import check_ids
from aiether.training.halting import copy_tokenizer

from .config import TuneConfig
from .inputs import RetrofitJob, TextWindows, load_base, read_windows
from .loop import Tuned, computed_in, tune
from .memory import MemoryEstimate, estimate_memory
from .order import shuffled
from .suggest import compare

SUMMARY, STATE = "retrofit.json", "state"


@dataclass(frozen=True)
class Retrofitted:
    """What came of it: losses in nats per token on held-out windows, before and afterwards.

    `seconds` are those of tuning, in all calls that it took.
    """

    path: Path
    layers: tuple[int, ...]
    before: float
    after: float
    windows: int
    trained: int
    seconds: float
    memory: MemoryEstimate
    lines: tuple[str, ...]

    def __str__(self) -> str:
        change = math.exp(self.after - self.before) - 1
        return "\n".join(
            [
                f"{self.path}: layers {', '.join(map(str, self.layers))}; {self.trained:,} numbers trained "
                f"in {duration(self.seconds)}",
                f"held-out loss, {self.windows} windows: {self.before:.4f} before, {self.after:.4f} after "
                f"(perplexity {100 * change:+.2f} %)",
                f"memory: estimated {self.memory}",
                *self.lines,
            ]
        )


def run_retrofit(
    job: RetrofitJob,
    progress: Progress | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Retrofitted:
    """Convert, tune and write; go on where an earlier call with the same settings was stopped.

    `report` is told each step's row, `tell` what memory tuning will need, before it begins.

    Raises
    ------
    ValueError
        For layers, platters or settings that do not fit the model, an output folder that holds something
        else, too little text, and losses that are not finite.
    """
    say, folder = progress or silent, Path(job.output_dir)
    _check_folder(job, folder)
    model = load_base(job)
    check_conversion(model, job.layers, job.settings)
    _check_backend(model, job)
    computed_in(model, job.tuning)
    text = read_windows(job, model, say)
    tuning = _steps(job, len(text.train))
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        before = _loss(model, text, tuning, say)
        layers = job.layers if job.layers is not None else compare(job, model, text, say).chosen
        memory = estimate_memory(model, layers, job.settings, tuning, text.length)
        torch.manual_seed(tuning.seed)  # fusion is drawn
        retrofit(model, layers=layers, settings=job.settings)
        if tell is not None:
            tell(f"tuning needs about {memory}")
        told_apart = f"{text.fingerprint()} {before:.4f}"  # the loss tells models apart
        about = f"{job.dataset_path} {len(text.train)} {text.length} {told_apart}"
        tuned = _tune(model, text, tuning, folder, say, report, about)
        found = Retrofitted(
            path=folder,
            layers=tuple(layers),
            before=before,
            after=_loss(model, text, tuning, say),
            windows=len(text.held_out),
            trained=tuned.trained,
            seconds=tuned.seconds,
            memory=memory,
            lines=tuple(told_terms(model)),
        )
        with without_progress_bars():
            model.save_pretrained(folder, whole=True if job.trust_remote_code else None)
        copy_tokenizer(job.model, Path(job.weights), job.tokenizer, folder)
        _write_summary(folder, found, tuned)  # from here on it is finished
        shutil.rmtree(folder / STATE, ignore_errors=True)
    return found


def _check_folder(job: RetrofitJob, folder: Path) -> None:
    """Raises ValueError for a folder that cannot become or is not an unfinished retrofit of this job."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir is {str(folder)!r}, which is a file: name a folder")
    if (folder / SUMMARY).is_file():
        raise ValueError(f"{str(folder)!r} holds a finished retrofit: choose another folder (--output_dir)")
    same = any(
        Path(each).is_dir() and folder.resolve() == Path(each).resolve() for each in (job.model, job.weights)
    )
    begun = job.trust_remote_code and (folder / STATE).is_dir()  # whole models are written then
    whole, differing = (folder / "config.json").is_file(), (folder / RECORD).is_file()
    if same or (whole and not begun) or (differing and not (folder / STATE).is_dir()):
        raise ValueError(
            f"{str(folder)!r} holds {'the' if same else 'a'} model, which would be overwritten: choose "
            "another folder (--output_dir)"
        )


def _check_backend(model: Any, job: RetrofitJob) -> None:
    """Raises ValueError where the kernels that are asked for cannot compute this, before a text is read."""
    first = job.layers[0] if job.layers else 0
    heads, size = model.config.num_attention_heads, head_dim_of(attention_modules(model, [first])[0])
    dtype = torch.bfloat16 if job.tuning.bf16 else model.dtype
    query = torch.empty(1, heads, 1, size, dtype=dtype, device=model.device)
    order = torch.zeros(1, dtype=torch.long, device=model.device)
    choose_backend(job.settings, Places(order, order), query, 0.0)


def told_terms(model: Any) -> list[str]:
    """The terms that training ended with, a line for each layer: a gate of 0 is no torus.

    One platter is the whole head, with or without a gate, so that none is told.
    """
    lines = []
    for layer, terms in zip(model.config.toroidal["layers"], torus_terms(model), strict=True):
        with torch.no_grad():
            strength, cross = terms.strength(terms.lambda_shift), terms.cross()
            low, high = terms.token_bounds()
        split = terms.settings.platters > 1
        gate = f"gate {float(terms.progress) * terms.settings.gate:.2f}" if split else "one platter"
        line = f"layer {layer}: {gate}, lambda {strength.min():.2f} to {strength.max():.2f}"
        if terms.settings.token_lambda:
            line += f" (of any token {low.min():.2f} to {high.max():.2f})"
        if split:
            line += f", cross {cross.min():.2f} to {cross.max():.2f}"
        lines.append(line)
    return lines


def _steps(job: RetrofitJob, windows: int) -> TuneConfig:
    """The tuning with as many steps as the epochs make, transfer among them in the same proportion."""
    tuning = job.tuning
    if job.epochs is None:
        return tuning
    total = max(1, round(job.epochs * windows / (tuning.batch_size * tuning.accumulation)))
    transfer = min(total, round(total * tuning.transfer_steps / max(1, tuning.all_steps)))
    return replace(tuning, transfer_steps=transfer, steps=total - transfer)


def _loss(model: Any, text: TextWindows, tuning: TuneConfig, say: Progress) -> float:
    say("evaluating", 0.0)
    windows = text_windows(text.tokens, text.held_out)
    return sum_losses(model, windows, batch_size=tuning.batch_size, bf16=tuning.bf16).loss


def _tune(
    model: Any,
    text: TextWindows,
    config: TuneConfig,
    folder: Path,
    say: Progress,
    report: Callable[[dict[str, Any]], None] | None,
    about: str,
) -> Tuned:
    size, places = config.batch_size, text.train

    def batch(number: int) -> Tensor:
        """Windows in an order that is new in every epoch."""
        order = shuffled(number, size, len(places), config.seed * 1_000_003)
        drawn = (places[index] for index in order)
        ids_BT = torch.stack([ids for ids, _ in text_windows(text.tokens, drawn)])
        check_ids(ids_BT, model)
        return ids_BT

    def told(row: dict[str, Any]) -> None:
        say("tuning", row["step"] / config.all_steps)
        if report is not None:
            report(row)

    return tune(model, batch, config, state_dir=folder / STATE, about=about, report=told)


def _write_summary(folder: Path, found: Retrofitted, tuned: Tuned) -> None:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in tuned.rows), encoding="utf-8"
    )
    write_json(
        folder / SUMMARY,
        {
            "layers": found.layers,
            "loss_before": found.before,
            "loss_after": found.after,
            "windows": found.windows,
            "trained_parameters": found.trained,
            "seconds": found.seconds,
            "memory_bytes": found.memory.total,
            "terms": found.lines,
        },
    )
