"""What watching the geometry costs: the same training with and without it, in turns, in one process.

    python benchmarks/watching.py [--steps 320] [--pairs 1] [--out benchmarks/results/watching.json]

Both arms are the default run of `aiether train` (preset `recommended`, the standard library's source) held at
its first depth: one with the geometric trigger at a threshold that is never reached, one with the trigger
`never`, which takes no snapshot. Evaluations are alike in both, so the difference in the time of the whole
`fit` is snapshots, Gram matrices and decisions. Processor seconds of one thread are compared, which other
load on the machine disturbs least. On a shared machine even those differ by a few per cent from run to run,
which is more than watching costs, so the time inside its calls is measured too, over a run that fills the
window. Medians over the pairs count.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from aiether.data import PackedData, TokenWindows, prepare
from aiether.growth import GrowthController
from aiether.integrations import fit
from aiether.training.arms import new_model
from aiether.training.config import TrainConfig, resolve
from aiether.training.trainer import build_trainer


@contextmanager
def time_inside_watching() -> Iterator[list[float]]:
    """Collects the wall-clock seconds of every snapshot, and of every evaluation's geometry and decision."""
    spent: list[float] = []
    honest = {name: getattr(GrowthController, name) for name in ("snapshot", "evaluate")}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            start = time.perf_counter()
            result = honest[name](*arguments, **settings)
            spent.append(time.perf_counter() - start)
            return result

        return call

    for name in honest:
        setattr(GrowthController, name, timed(name))
    try:
        yield spent
    finally:
        for name, method in honest.items():
            setattr(GrowthController, name, method)


def seconds_of_fit(config: TrainConfig, data: PackedData, steps: int, directory: Path) -> dict[str, float]:
    """Seconds of one run at a fixed depth, with its first and last checkpoint only."""
    sequences = steps * config.batch_size
    windows = TokenWindows(data.train, config.context_length, seed=config.seed, num_windows=sequences)
    held_out = config.eval_batches * config.batch_size
    validation = TokenWindows(data.validation, config.context_length, seed=None, num_windows=held_out)
    model = new_model(config, data, config.n_layer)
    trainer = build_trainer(config, model, windows, validation, max_steps=steps, output_dir=directory)
    trainer.args.save_strategy = "no"
    processor, wall = time.process_time(), time.perf_counter()
    with time_inside_watching() as inside:
        result = fit(trainer, config, output_dir=directory)
    assert result.num_growths == 0
    seconds = {"processor_s": time.process_time() - processor, "wall_s": time.perf_counter() - wall}
    return seconds | {"inside_watching_s": sum(inside)}


def measure(steps: int, pairs: int, depth: int) -> dict[str, Any]:
    base = replace(resolve("recommended", {}, {}), n_layer=depth, device="cpu")
    data = prepare(base)
    watched = replace(base, tau_crit=1e9, kappa_crit=1e9)
    blind = replace(base, trigger="never")
    rows = []
    for pair in range(pairs + 1):  # the first pair warms up and does not count
        seconds = {}
        for name, config in (
            (("watched", watched), ("blind", blind)) if pair % 2 else (("blind", blind), ("watched", watched))
        ):
            with tempfile.TemporaryDirectory() as directory:
                seconds[name] = seconds_of_fit(config, data, steps if pair else 20, Path(directory))
        if pair:
            rows.append(seconds)
    ratios = [row["watched"]["processor_s"] / row["blind"]["processor_s"] for row in rows]
    return {
        "n_layer": depth,
        "n_embd": base.n_embd,
        "steps": steps,
        "collect_interval_steps": base.collect_interval_steps,
        "history_window_size": base.history_window_size,
        "eval_interval_steps": base.eval_interval_steps,
        "pairs": rows,
        "median_share_inside_watching": statistics.median(
            row["watched"]["inside_watching_s"] / row["watched"]["wall_s"] for row in rows
        ),
        "overhead": [ratio - 1 for ratio in ratios],
        "median_overhead": statistics.median(ratios) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/watching.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = {
        "runs": [measure(arguments.steps, arguments.pairs, depth) for depth in (2,)],
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "seed": 0,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for run in result["runs"]:
        share, spread = run["median_share_inside_watching"], run["overhead"]
        model = f"{run['n_layer']} layers of width {run['n_embd']}"
        print(f"watching {model}: {share:.2%} of the time inside its calls")
        print(f"between paired runs {min(spread):+.1%} to {max(spread):+.1%}, other load included")


if __name__ == "__main__":
    main()
