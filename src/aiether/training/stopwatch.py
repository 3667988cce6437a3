"""What a training step takes at every depth that a run can have, measured before its clock starts."""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from aiether.data import PackedData
from aiether.growth import GrowthConfig
from aiether.integrations import Interrupted, Row, RunObserver, fit

from .arms import new_model, replays_graphs, windows
from .config import TrainConfig
from .trainer import build_trainer

_STEPS = 8
_FOLDER = ".stopwatch-"


def seconds_per_step(
    config: TrainConfig, data: PackedData, depths: Sequence[int], run_dir: Path
) -> dict[int, float]:
    """Seconds of an optimizer step by depth, with everything training; needs `run_dir` for a while.

    A model of the first depth, thrown away afterwards, is trained by the run's own Trainer on the run's own
    first batches, grown to each next depth and trained on: some sixteen steps a depth, of which the second
    half is timed. A deeper model is taken to be no faster.

    In this process these are warm afterwards, so that the run's clock does not count them: the allocator and
    the choice of kernels at every depth, evaluation, growth, and with `compile` the graphs of the blocks (one
    set serves all depths), of the head and of the optimizer, with and without frozen layers (protocol
    `report`; gradual unfreezing is walked through a layer a step). Not warm are the forks of a probe, and
    CUDA graphs, which every model records for itself.

    Raises
    ------
    Interrupted
        For a signal meanwhile.
    """
    growth = GrowthConfig(**{f.name: getattr(config, f.name) for f in fields(GrowthConfig)})
    gradual = growth.protocol == "report" and growth.unfreeze == "gradual"
    half = _STEPS + (depths[-1] if gradual else 0)
    stages = len(depths)
    growth = replace(
        growth,
        trigger="fixed" if stages > 1 else "never",
        growth_fractions=tuple(stage / stages for stage in range(1, stages)),
        grow_to=tuple(depths[1:]),
        max_layers=depths[-1],
        latest_growth=1.0,
        lag_candidates=(),
        dry_run=False,
        isolated_warmup_steps=1,
        unfreeze_interval_steps=1,
    )
    steps = 2 * half * stages
    config = replace(config, eval_interval_steps=half, eval_batches=1)
    watch = _Watch(half)
    for left_over in run_dir.glob(f"{_FOLDER}*"):  # of a process that was killed
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=run_dir) as folder:
        train, validation = windows(config, data, steps)
        trainer = build_trainer(
            config,
            new_model(config, data, depths[0]),
            train,
            validation,
            max_steps=steps,
            output_dir=Path(folder),
        )
        trainer.args.save_steps = steps
        result = fit(
            trainer,
            growth,
            observers=[watch],
            compile=config.compile,
            cuda_graphs=replays_graphs(config, trainer.args.device.type),
        )
    if result.status == "interrupted":
        raise Interrupted(result.signal or "SIGINT")
    del trainer, result
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return dict(zip(watch.seconds, itertools.accumulate(watch.seconds.values(), max), strict=True))


class _Watch(RunObserver):
    """Times the second half of every stage, between two evaluations, at which the device has caught up."""

    def __init__(self, half: int) -> None:
        self.half, self.seconds = half, dict[int, float]()
        self._begun = 0.0

    def on_evaluate(self, row: Row) -> None:
        if row["step"] // self.half % 2:
            self._begun = row["train_seconds"]
        else:
            self.seconds[row["depth"]] = max((row["train_seconds"] - self._begun) / self.half, 1e-9)
