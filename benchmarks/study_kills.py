"""Killing a study's runner and its workers at random times, and running it again: the results are the same.

    python benchmarks/study_kills.py --kills 5

A small study on the standard library (two equal arms, a static one at three lengths, two seeds, a budget of
tokens) is run once undisturbed and once with its runner or one of its workers killed (SIGKILL) at random
times; after a runner's death the command is given again. Compared are the two results.json, timings aside,
and the curves of the equal arms. Writes benchmarks/results/study_kills.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from _machine import about
from aiether.study.results import without_timings

RESULT = Path(__file__).parent / "results" / "study_kills.json"
GROWN = {"n_layer": 1, "max_layers": 2}
STUDY: dict[str, Any] = {
    "name": "kills",
    "question": "Do kills change anything?",
    "baseline": "static",
    "seeds": 2,
    "budget": {"tokens": 40 * 8 * 64},
    "lengths": [0.5, 0.7, 1.0],
    "eval_windows": 16,
    "allow_identical_arms": True,
    "base": {
        "preset": "recommended",
        "device": "cpu",
        "n_head": 2,
        "n_embd": 64,
        "context_length": 64,
        "vocab_size": 512,
        "batch_size": 8,
        "lr_warmup_steps": 4,
        "eval_interval_steps": 5,
        "log_interval_steps": 5,
        "save_interval_steps": 4,
    },
    "conditions": {
        "static": {"settings": {"n_layer": 2, "max_layers": 2, "trigger": "never"}},
        "grown": {"settings": GROWN},
        "twin": {"settings": GROWN},
    },
}


def start(study: Path, folder: Path, workers: int) -> subprocess.Popen[bytes]:
    """`aiether study run` on its way."""
    command = [sys.executable, "-m", "aiether", "study", "run", str(study), "--output_dir", str(folder)]
    return subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)


def finish(study: Path, folder: Path, workers: int) -> dict[str, Any]:
    status = start(study, folder, workers).wait()
    if status:
        raise SystemExit(f"the study ended with status {status}")
    return json.loads((folder / "results.json").read_text())


def kill_at_random(
    study: Path, folder: Path, workers: int, kills: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Kill the runner or a worker, at random, in the middle of training; the runner is started again."""
    told: list[dict[str, Any]] = []
    process = start(study, folder, workers)
    while len(told) < kills:
        began = time.time()
        while not (running := under_way(folder, began)):
            if process.poll() is not None:
                raise SystemExit(f"the study was over after {len(told)} kills: take more seeds or tokens")
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 3.0))
        children = [child.pid for child in psutil.Process(process.pid).children()]
        victim = rng.choice((process.pid, rng.choice(children)))
        psutil.Process(victim).kill()
        told.append({"victim": "runner" if victim == process.pid else "worker", "runs_under_way": running})
        print(json.dumps(told[-1]), flush=True)
        if victim == process.pid:
            process.wait()
            process = start(study, folder, workers)
    if process.wait() not in (0, 3):  # 3: a run was killed twice, which is told, and the next call does it
        raise SystemExit(f"the study ended with status {process.returncode}")
    return told


def under_way(folder: Path, since: float) -> list[str]:
    """Runs with a checkpoint that have written a record since a time and are not over."""
    records = [path for path in folder.glob("cells/*/*/metrics.jsonl") if path.stat().st_mtime > since]
    runs = [path.parent for path in records if not (path.parent / "summary.json").exists()]
    return [f"{run.parent.name}/{run.name}" for run in runs if any((run / "checkpoints").glob("step-*"))]


def differences(one: Any, other: Any, place: str = "results") -> list[str]:
    """Where two results differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(f"{place}.{key}", one.get(key), other.get(key)) for key in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{place}[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{place}: {one!r} and {other!r}"]
    return [each for name, a, b in pairs for each in differences(a, b, name)]


def twins_are_equal(folder: Path) -> bool:
    losses = []
    for name in ("grown", "twin"):
        runs = sorted((folder / "cells" / name).glob("*/metrics.jsonl"))
        rows = [json.loads(line) for path in runs for line in path.read_text().splitlines()]
        losses.append([(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows])
    return len(losses[0]) > 0 and losses[0] == losses[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        study = Path(place) / "study.yaml"
        study.write_text(yaml.safe_dump(json.loads(json.dumps(STUDY))))  # without aliases
        undisturbed = finish(study, Path(place) / "undisturbed", arguments.workers)
        disturbed = Path(place) / "disturbed"
        rng = random.Random(arguments.seed)
        kills = kill_at_random(study, disturbed, arguments.workers, arguments.kills, rng)
        found = finish(study, disturbed, arguments.workers)
        for difference in differences(without_timings(undisturbed), without_timings(found)):
            print(difference, flush=True)
        result = about(seeds=[arguments.seed], more_versions=["scipy", "statsmodels"]) | {
            "kills": kills,
            "runs": sum(len(arm["cells"]) for arm in found["arms"]),
            "equal_results": without_timings(found) == without_timings(undisturbed),
            "twins_are_equal": twins_are_equal(Path(place) / "undisturbed"),
        }
    print(json.dumps(result, indent=2))
    if not (result["equal_results"] and result["twins_are_equal"]):
        raise SystemExit("the kills changed something")
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
