"""Runs one job of the kill tests in a process of its own, and kills it with SIGKILL where it is told to.

Not a test: test_kill_resume.py starts it, in a child forked from a server that has the imports done.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aiether.growth import controller
from aiether.integrations import _checkpoint, _stage
from aiether.training import arms, run, samples
from aiether.training.config import resolve


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner: Any, name: str, *, call: int, after: bool = False, of: str = "") -> None:
    """Die before (or after) the n-th call of `owner.name` that has a path with `of` in its last part."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += not of or any(isinstance(arg, Path) and of in arg.name for arg in args)
        if calls == call and not after:
            die()
        result = original(*args, **kwargs)
        if calls == call:
            die()
        return result

    setattr(owner, name, wrapped)


def kill_during_step(seed: int, first: int, last: int) -> None:
    """Die at a random moment in or shortly after a random step, wherever the program then is."""
    chance = random.Random(seed)
    chosen, delay = chance.randrange(first, last), chance.uniform(0.0, 0.03)
    original = _stage.Stage.before_step

    def wrapped(self: _stage.Stage, step: int) -> None:
        if step == chosen:
            threading.Timer(delay, die).start()
        original(self, step)

    _stage.Stage.before_step = wrapped


KILLS: dict[str, Callable[[], None]] = {
    "nowhere": lambda: None,
    "growth": lambda: kill_at_call(controller, "migrate", call=2, after=True),
    "checkpoint-half-written": lambda: kill_at_call(_checkpoint, "save_file", call=4, of=_checkpoint.MOMENTS),
    "checkpoint-not-renamed": lambda: kill_at_call(Path, "rename", call=5, of=".step-"),
    "snapshot-half-written": lambda: kill_at_call(Path, "replace", call=7, of=".step-"),
    "model-half-exported": lambda: kill_at_call(Path, "rename", call=1, of=".final."),
    "model-exported": lambda: kill_at_call(arms, "write_json", call=1, of="result.json"),
    "baseline-trained": lambda: kill_at_call(arms, "export", call=2),
    "random-1": lambda: kill_during_step(1, 3, 20),
    "random-2": lambda: kill_during_step(2, 20, 38),
}


def main(settings: dict[str, Any], run_dir: str, kill: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    run.write_report = lambda directory: directory / "report.html"  # seconds a run, and not what is tested
    samples.NEW_TOKENS = 20
    KILLS[kill]()
    if (Path(run_dir) / run.CONFIG).exists():
        run.resume(run_dir)
    else:
        run.train(resolve("recommended", {}, {**settings, "output_dir": run_dir}))


if __name__ == "__kill_driver__":
    main(**globals()["JOB"])
