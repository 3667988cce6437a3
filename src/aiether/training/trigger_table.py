"""What every trigger would have done with a recorded run, as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiether.growth import GrowthConfig, planned_depth
from aiether.growth.replay import Stretch, calibrate, every_firing, stretches

from .config import read_config
from .report.run_records import read_json_lines


def trigger_table(run_dir: Path, quantiles: Sequence[float]) -> str:
    """For each depth of a run: when each trigger would first have grown it, and calibrated thresholds.

    Raises
    ------
    ValueError
        If the folder holds no run, or its records are damaged.
    """
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(
            f"{str(run_dir)!r} holds no run (config.yaml or metrics.jsonl is missing); name a folder such as "
            "runs/NAME"
        )
    config = read_config(run_dir / "config.yaml")
    known = {
        "total_steps": _total_steps(run_dir),
        "final_depth": planned_depth(config, config.n_layer),
        "seed": config.seed,
    }
    found = stretches(read_json_lines(run_dir / "metrics.jsonl"))
    if not found:
        raise ValueError(f"{str(run_dir)!r} holds no evaluation yet: let the run go on")
    lines = [f"{known['total_steps']} steps planned; the run's own trigger is {config.trigger!r}"]
    for stretch in found:
        lines += ["", *_of_stretch(config, stretch, quantiles, known)]
    return "\n".join(lines)


def _total_steps(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / "lineage.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(run_dir / 'lineage.json')!r} does not tell how many steps were planned: restore it"
        ) from error


def _of_stretch(
    config: GrowthConfig, stretch: Stretch, quantiles: Sequence[float], known: dict[str, Any]
) -> list[str]:
    first, last = stretch.steps[0], stretch.steps[-1]
    lines = [f"with {stretch.depth} layers, evaluations from step {first} to {last}:"]
    if stretch.depth >= known["final_depth"]:
        return [*lines, "  the final depth: nothing is left to grow"]
    for firing in every_firing(config, stretch, **known):
        when = f"at step {firing.step}" if firing.step is not None else "not at all"
        lines.append(f"  {firing.trigger:10} {when if firing.asked else 'unknown':13} {firing.reason}")
    if not any(stretch.metrics):
        return [
            *lines,
            "  no geometry was measured: record a run with --dry_run true to calibrate thresholds",
        ]
    lines.append(f"  thresholds ({config.thresholds}) from this history, and when they would have fired:")
    for entry in calibrate(config, stretch, quantiles, **known):
        step = entry.firing.step
        when = f"at step {step}" if step is not None else "not at all"
        lines.append(
            f"  quantile {entry.quantile:<4g} --tau_crit {entry.tau_crit:.3g} "
            f"--kappa_crit {entry.kappa_crit:.3g}  {when}"
        )
    return lines
