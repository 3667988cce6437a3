"""What watching the geometry costs: a watched run and two blind ones take turns, step by step.

    python benchmarks/watching.py [--steps 800] [--device cpu|cuda] [--out benchmarks/results/watching.json]

All arms are held at their first depth: one with the geometric trigger at a threshold that is never reached,
two with the trigger `never`, which takes no snapshot. Evaluations are alike in all, so what differs is
snapshots, Gram matrices and decisions. The speed of a shared machine drifts by more than that within seconds;
the runs therefore take turns inside one process, a step each, in an order that moves on by one every time.
Blocks of 20 steps (the interval between snapshots) are compared with the blind arm's of the same time. The
second blind arm is the control: what it shows against the first is the method's own error. Steps count from
the moment that the window is full. On a CPU processor seconds of one thread are compared, on a GPU wall-clock
seconds between two synchronisations. The time inside the watching calls alone is measured too.

CPU: the default run of `aiether train`. GPU: 12 layers of width 512, 64 x 512 tokens, bf16, compiled.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from aiether.data import PackedData, TokenWindows, prepare
from aiether.growth import GrowthController
from aiether.integrations import RunObserver, fit
from aiether.training.arms import new_model
from aiether.training.config import TrainConfig, resolve
from aiether.training.trainer import build_trainer

BLOCK_STEPS = 20
ARMS: tuple[str, ...] = ("watched", "blind", "control")
GPU_SHAPE: dict[str, Any] = {
    "n_layer": 12,
    "max_layers": 24,
    "n_head": 8,
    "n_embd": 512,
    "context_length": 512,
    "batch_size": 64,
    "bf16": True,
    "compile": True,
}


class Turns:
    """Lets one of several threads run at a time: each once a round; its first is last in the next."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._round, self._place = list(ARMS), 0

    def wait(self, arm: str) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._round[self._place] == arm)

    def pass_on(self) -> None:
        with self._condition:
            self._place += 1
            if self._place == len(self._round):
                self._round, self._place = [*self._round[1:], self._round[0]], 0
            self._condition.notify_all()

    def leave(self, arm: str) -> None:
        """The arm has ended, whether or not it is its turn; the others go on without it."""
        with self._condition:
            index = self._round.index(arm)
            self._round.remove(arm)
            self._place -= index < self._place
            self._place %= max(len(self._round), 1)
            self._condition.notify_all()


class TurnClock(RunObserver):
    """Times the steps of one arm in blocks and hands over after each step."""

    def __init__(self, arm: str, turns: Turns, clock: Callable[[], float]) -> None:
        self.arm, self.turns, self.clock = arm, turns, clock
        self.blocks: list[float] = []
        self._start: float | None = None
        self._block_s = 0.0

    def on_step(self, step: int, train_seconds: float) -> None:
        if self._start is not None:  # the first step holds the set-up
            self._block_s += self.clock() - self._start
        if step % BLOCK_STEPS == 0:
            self.blocks.append(self._block_s)
            self._block_s = 0.0
        self.turns.pass_on()
        self.turns.wait(self.arm)
        self._start = self.clock()


@contextmanager
def time_inside_watching(clock: Callable[[], float]) -> Iterator[list[float]]:
    """Collects the seconds of every snapshot, and of every evaluation's geometry and decision."""
    spent: list[float] = []
    honest = {name: getattr(GrowthController, name) for name in ("snapshot", "evaluate")}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            start = clock()
            result = honest[name](*arguments, **settings)
            spent.append(clock() - start)
            return result

        return call

    for name in honest:
        setattr(GrowthController, name, timed(name))
    try:
        yield spent
    finally:
        for name, method in honest.items():
            setattr(GrowthController, name, method)


def train_in_turns(
    config: TrainConfig, data: PackedData, steps: int, observer: TurnClock, directory: Path
) -> float:
    """Train one arm; returns its wall-clock seconds of training."""
    sequences = steps * config.batch_size
    windows = TokenWindows(data.train, config.context_length, seed=config.seed, num_windows=sequences)
    held_out = config.eval_batches * config.batch_size
    validation = TokenWindows(data.validation, config.context_length, seed=None, num_windows=held_out)
    observer.turns.wait(observer.arm)
    try:
        model = new_model(config, data, config.n_layer)
        trainer = build_trainer(
            config, model, windows, validation, max_steps=steps, output_dir=directory / observer.arm
        )
        trainer.args.save_strategy = "no"
        result = fit(
            trainer,
            config,
            output_dir=directory / observer.arm,
            observers=[observer],
            compile=config.compile,
        )
        assert result.num_growths == 0
        return result.train_seconds
    finally:
        observer.turns.leave(observer.arm)


def measure(base: TrainConfig, steps: int) -> dict[str, Any]:
    on_gpu = base.device == "cuda"
    clock = _gpu_clock if on_gpu else time.process_time
    configs: dict[str, TrainConfig] = {
        "watched": replace(base, trigger="geometric", tau_crit=1e9, kappa_crit=1e9),
        "blind": replace(base, trigger="never"),
        "control": replace(base, trigger="never"),
    }
    data, turns = prepare(base), Turns()
    clocks = {arm: TurnClock(arm, turns, clock) for arm in ARMS}
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(len(ARMS)) as pool,
        time_inside_watching(clock) as inside,
    ):
        running = [
            pool.submit(train_in_turns, configs[arm], data, steps, clocks[arm], Path(directory))
            for arm in ARMS
        ]
        for arm in running:
            arm.result()
    full = base.history_window_size * base.collect_interval_steps // BLOCK_STEPS
    blocks = list(zip(*(clocks[arm].blocks[full:] for arm in ARMS), strict=True))
    watched, blind, control = (list(seconds) for seconds in zip(*blocks, strict=True))
    return {
        "n_layer": base.n_layer,
        "n_embd": base.n_embd,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "steps": steps,
        "block_steps": BLOCK_STEPS,
        "collect_interval_steps": base.collect_interval_steps,
        "history_window_size": base.history_window_size,
        "eval_interval_steps": base.eval_interval_steps,
        "arms": ARMS,
        "block_seconds": blocks,
        "share_inside_watching": sum(inside) / sum(clocks["watched"].blocks),
        "watched": compare(watched, blind),
        "control": compare(control, blind),
    }


def compare(seconds: list[float], blind: list[float]) -> dict[str, Any]:
    """How much longer an arm took than the blind one: all its seconds, and 95 % of what resampling shows."""
    pairs = np.array([seconds, blind])
    drawn = pairs[:, np.random.default_rng(0).integers(len(seconds), size=(2000, len(seconds)))].sum(-1)
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975)) - 1
    ratios = [one / other for one, other in zip(seconds, blind, strict=True)]
    return {
        "overhead": sum(seconds) / sum(blind) - 1,
        "interval_95": [float(low), float(high)],
        "median_of_blocks": statistics.median(ratios) - 1,
    }


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shape = GPU_SHAPE if arguments.device == "cuda" else {}
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    base = replace(resolve("recommended", {}, shape), device=arguments.device)
    run = measure(base, arguments.steps)
    result = {
        "run": run,
        "machine": {"processor": _cpu_name(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": _commit(),
        "seed": base.seed,
    }
    name = "watching" if arguments.device == "cpu" else "watching_gpu"
    out = arguments.out or Path("benchmarks/results") / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"watching {run['n_layer']} layers of width {run['n_embd']} on {run['device']}:")
    print(f"{run['share_inside_watching']:.2%} of the time inside its calls")
    for arm in ("watched", "control"):
        figures = run[arm]
        low, high = figures["interval_95"]
        print(
            f"{arm}, {len(run['block_seconds'])} blocks of {BLOCK_STEPS} steps: {figures['overhead']:+.2%} "
            f"(95 %: {low:+.2%} to {high:+.2%}), median of blocks {figures['median_of_blocks']:+.2%}"
        )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
