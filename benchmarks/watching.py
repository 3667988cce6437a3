"""What watching the geometry costs: two runs of the same training take turns at watching.

    python benchmarks/watching.py [--blocks 8] [--device cpu|cuda] [--out benchmarks/results/watching.json]

Both runs are held at their first depth by thresholds that are never reached, and fill their windows. Then, in
blocks of 100 steps (5 snapshots and 2 evaluations), one of them takes snapshots and measures them and the
other does neither; in the next block they change places. Within a block they take turns inside one process, a
step each, since the speed of a shared machine drifts within seconds. Two runs that do exactly the same differ
by up to 3 % for as long as they live (their memory lies elsewhere): that each of them watches in every second
block takes this out. Every 20 steps give log(seconds of the first / seconds of the second); the overhead is
half the difference between the blocks in which the first watches and those in which the second does.

On a CPU processor seconds of one thread are compared, on a GPU wall-clock seconds between two
synchronisations. The time inside the watching calls alone is measured too.

CPU: the default run of `aiether train`. GPU: 12 layers of width 512, 64 x 512 tokens, bf16, compiled.
"""

from __future__ import annotations

import argparse
import json
import logging
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

from _machine import about
from aiether.data import PackedData, TokenWindows, prepare
from aiether.growth import GrowthController
from aiether.integrations import RunObserver, fit
from aiether.training.arms import new_model
from aiether.training.config import TrainConfig, resolve
from aiether.training.trainer import build_trainer

BLOCK_STEPS, PIECE_STEPS = 100, 20
ARMS: tuple[str, ...] = ("first", "second")
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
    """Times the steps of one arm, 20 at a time, and hands over after each step."""

    def __init__(self, arm: str, turns: Turns, clock: Callable[[], float]) -> None:
        self.arm, self.turns, self.clock = arm, turns, clock
        self.pieces: list[float] = []
        self._start: float | None = None
        self._piece_s = 0.0

    def on_step(self, step: int, train_seconds: float) -> None:
        if self._start is not None:  # the first step holds the set-up
            self._piece_s += self.clock() - self._start
        if step % PIECE_STEPS == 0:
            self.pieces.append(self._piece_s)
            self._piece_s = 0.0
        self.turns.pass_on()
        self.turns.wait(self.arm)
        self._start = self.clock()


class Watching:
    """Which arm watches: both until the windows are full, then every second block, in turn."""

    def __init__(self, clock: Callable[[], float], full_steps: int) -> None:
        self.clock, self.full_steps = clock, full_steps
        self.seconds_inside: list[float] = []
        self._arm_of_thread: dict[int, str] = {}

    def enter(self, arm: str) -> None:
        self._arm_of_thread[threading.get_ident()] = arm

    def watches(self, arm: str, step: int) -> bool:
        if step <= self.full_steps:
            return True
        return (step - 1) // BLOCK_STEPS % 2 == ARMS.index(arm)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Takes snapshots and measurements away from the arm that does not watch, and times the rest."""
        wants, snapshot, measure = (
            GrowthController.wants_snapshot,
            GrowthController.snapshot,
            GrowthController._measure,  # pyright: ignore[reportPrivateUsage]
        )
        steps: dict[str, int] = dict.fromkeys(ARMS, 0)
        watching = self

        def wants_snapshot(self: GrowthController, step: int) -> bool:
            arm = watching._arm_of_thread[threading.get_ident()]
            steps[arm] = step
            return watching.watches(arm, step) and wants(self, step)

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                arm = self._arm_of_thread[threading.get_ident()]
                if not self.watches(arm, steps[arm]):
                    return None
                start = self.clock()
                result = call(*arguments)
                self.seconds_inside += [self.clock() - start] if steps[arm] > self.full_steps else []
                return result

            return run

        GrowthController.wants_snapshot = wants_snapshot
        GrowthController.snapshot = timed(snapshot)
        GrowthController._measure = timed(measure)  # pyright: ignore[reportPrivateUsage]
        try:
            yield
        finally:
            GrowthController.wants_snapshot = wants
            GrowthController.snapshot = snapshot
            GrowthController._measure = measure  # pyright: ignore[reportPrivateUsage]


def train_in_turns(
    config: TrainConfig,
    data: PackedData,
    steps: int,
    observer: TurnClock,
    directory: Path,
    watching: Watching,
) -> None:
    """Train one arm."""
    watching.enter(observer.arm)
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
    finally:
        observer.turns.leave(observer.arm)


def measure(base: TrainConfig, num_blocks: int) -> dict[str, Any]:
    on_gpu = base.device == "cuda"
    clock = _gpu_clock if on_gpu else time.process_time
    config = replace(base, trigger="geometric", tau_crit=1e9, kappa_crit=1e9, deadline_fractions=())
    full = base.history_window_size * base.collect_interval_steps // BLOCK_STEPS * BLOCK_STEPS
    steps = full + num_blocks * BLOCK_STEPS
    data, turns = prepare(base), Turns()
    watching = Watching(clock, full)
    clocks = {arm: TurnClock(arm, turns, clock) for arm in ARMS}
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(len(ARMS)) as pool,
        watching.installed(),
    ):
        running = [
            pool.submit(train_in_turns, config, data, steps, clocks[arm], Path(directory), watching)
            for arm in ARMS
        ]
        for arm in running:
            arm.result()
    pieces = list(zip(*(clocks[arm].pieces[full // PIECE_STEPS :] for arm in ARMS), strict=True))
    first_watches = [
        watching.watches("first", full + PIECE_STEPS * index + 1) for index in range(len(pieces))
    ]
    watched = sum(pair[0] if first else pair[1] for pair, first in zip(pieces, first_watches, strict=True))
    overhead, interval = overhead_of(np.array(pieces), np.array(first_watches))
    return {
        "n_layer": base.n_layer,
        "n_embd": base.n_embd,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "steps": steps,
        "block_steps": BLOCK_STEPS,
        "collect_interval_steps": base.collect_interval_steps,
        "history_window_size": base.history_window_size,
        "eval_interval_steps": base.eval_interval_steps,
        "piece_steps": PIECE_STEPS,
        "piece_seconds": pieces,
        "first_watches": first_watches,
        "share_inside_watching": sum(watching.seconds_inside) / watched,
        "overhead": overhead,
        "interval_95": interval,
    }


def overhead_of(seconds: np.ndarray, first_watches: np.ndarray) -> tuple[float, list[float]]:
    """The overhead, and what 95 % of resamplings of the pieces show. `seconds` is (pieces, 2)."""
    ratios = np.log(seconds[:, 0] / seconds[:, 1])
    groups = ratios[first_watches], ratios[~first_watches]
    rng = np.random.default_rng(0)
    drawn = [rng.choice(group, size=(4000, len(group))).mean(axis=1) for group in groups]
    overhead = np.expm1((groups[0].mean() - groups[1].mean()) / 2)
    interval = np.expm1(np.quantile((drawn[0] - drawn[1]) / 2, (0.025, 0.975)))
    return float(overhead), interval.tolist()


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=8, help="of 100 steps, after the windows are full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--commit", default=None, help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shape = GPU_SHAPE if arguments.device == "cuda" else {}
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    base = replace(resolve("recommended", {}, shape), device=arguments.device)
    where = about(seeds=[base.seed], commit=arguments.commit)
    run = measure(base, arguments.blocks)
    result = {"run": run, "threads": torch.get_num_threads(), **where}
    name = "watching" if arguments.device == "cpu" else "watching_gpu"
    out = arguments.out or Path("benchmarks/results") / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"watching {run['n_layer']} layers of width {run['n_embd']} on {run['device']}:")
    print(f"{run['share_inside_watching']:.2%} of the time inside its calls")
    low, high = run["interval_95"]
    print(f"{arguments.blocks} blocks of {BLOCK_STEPS} steps: {run['overhead']:+.2%}")
    print(f"95 % of resamplings: {low:+.2%} to {high:+.2%}")


if __name__ == "__main__":
    main()
