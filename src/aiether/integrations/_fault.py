"""Faults that end a run although nothing of it is lost: a full disk, a loss of NaN, too little memory."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"os error (\d+)")  # how safetensors reports what the system said
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't allocate memory", "Cannot allocate memory")


class RunFault(RuntimeError):
    """The run ended in the middle. The message, one line, says what happened, what to do, and how to go on.

    `checkpoint` is the newest complete one, None if there is none yet.
    """

    exit_status = 3

    def __init__(
        self, problem: str, remedy: str, checkpoint: Path | None, resume: str = "fit(trainer, resume=True)"
    ) -> None:
        self.problem, self.remedy, self.checkpoint = problem, remedy, checkpoint
        kept = (
            f"the newest complete checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        )
        then = f"then go on with: {resume}" if checkpoint else "then start again"
        super().__init__(f"{problem}; {kept}. {remedy}, {then}")

    def resumed_by(self, command: str) -> RunFault:
        """The same fault with another way to go on."""
        return type(self)(self.problem, self.remedy, self.checkpoint, command)


class OutOfMemory(RunFault):
    """Too little memory for a training step, or for the planned final depth."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of Python's or safetensors' means that the disk, a quota or a size limit is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    said = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    return said is not None and int(said[1]) in _FULL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def disk_full(error: BaseException, what: str, folder: Path, checkpoint: Path | None) -> RunFault:
    """The fault for a write without room on the disk; `what` names it, as in "the checkpoint of step 5"."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return RunFault(
        f"{what} could not be written ({reason}; {size(shutil.disk_usage(there).free)} are free in {there})",
        "Free some space there",
        checkpoint,
    )


def out_of_memory(
    where: str, said: str, args: TrainingArguments, window_on_device: bool, checkpoint: Path | None
) -> OutOfMemory:
    """The fault for what ran out of memory at `where`; `said` is the allocator's message."""
    return OutOfMemory(
        f"{where} ran out of memory ({said.split('. ')[0][:200]})",
        less_memory(
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            bf16=args.bf16,
            window_on_device=window_on_device,
        ),
        checkpoint,
    )


def less_memory(batch_size: int, accumulation: int, *, bf16: bool, window_on_device: bool) -> str:
    """What to lower, in a clause: the tokens of a step stay as they are."""
    parts = []
    if batch_size > 1:
        factor = next(number for number in range(2, batch_size + 1) if batch_size % number == 0)
        parts.append(
            f"take a batch size of {batch_size // factor} with gradient_accumulation_steps="
            f"{accumulation * factor} (the same tokens per step)"
        )
    if not bf16:
        parts.append("bf16")
    if window_on_device:
        parts.append("snapshot_storage='host' or 'disk'")
    parts.append("a smaller max_layers, width or context length")
    return ", or ".join(parts)


def size(nbytes: float) -> str:
    """Bytes for people: 1.5 GB, 20 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if nbytes >= 100 or unit == "bytes" else f"{nbytes:.1f} {unit}"
