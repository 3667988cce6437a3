"""Kills a growing job with SIGKILL at random moments, resumes it each time, and compares the bits.

    python benchmarks/kill_resume.py [--kills 20] [--seed 0] [--out benchmarks/results/kill_resume.json]

The job (the standard library's source, dropout, Muon, float32 on one CPU thread) runs once undisturbed, then
again under kills: each process lives for a time drawn uniformly, by the wall clock, from its start. A job
that is done before its kills are used up is compared and started anew. Processes are forked from a server
that has the imports done, so that the kills fall into the work and not into `import torch`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _machine import about

SETTINGS: dict[str, Any] = {
    "n_layer": 1,
    "max_layers": 4,
    "n_head": 4,
    "n_embd": 64,
    "context_length": 64,
    "vocab_size": 1024,
    "dropout": 0.1,
    "max_steps": 1000,
    "batch_size": 8,
    "optimizer": "muon",
    "trigger": "geometric",
    "init": "geometric",
    "tau_crit": 0.01,
    "kappa_crit": 0.01,
    "pg_patience": 3,
    "pg_threshold": 0.5,
    "eval_interval_steps": 40,
    "eval_batches": 4,
    "log_interval_steps": 1,
    "save_interval_steps": 15,
    "device": "cpu",
}
TIMINGS = {"elapsed_s", "eval_seconds", "eval_steps_per_s", "seconds", "steps_per_s", "tokens_per_s"}
JOB_NAME = "__kill_resume_job__"


@dataclass(frozen=True)
class Kill:
    """When a process was killed, and how far it was: the last step recorded, the checkpoint to go on from."""

    run: int
    after_s: float
    step: int
    depth: int
    checkpoint: str | None
    unfinished: list[str]  # temporary files that the kill left: what was being written


def job(run_dir: str) -> None:
    """Train, or resume where a run is. Runs in a process of its own."""
    import torch

    from aiether.training import run
    from aiether.training.config import resolve

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if (Path(run_dir) / run.CONFIG).exists():
        run.resume(run_dir)
    else:
        run.train(resolve("recommended", {}, {**SETTINGS, "output_dir": run_dir}))


def prepare_data() -> None:
    """Into the cache of prepared data, so that no process of the comparison does it."""
    from aiether.data import DataConfig, prepare

    prepare(DataConfig(vocab_size=SETTINGS["vocab_size"]))


def start(run_dir: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aiether.training.run"])
    process = context.Process(
        target=runpy.run_path,
        args=(__file__, {"RUN_DIR": str(run_dir)}),
        kwargs={"run_name": JOB_NAME},
    )
    process.start()
    return process


def finish(run_dir: Path) -> float:
    """Run to the end; returns the seconds that took."""
    started = time.perf_counter()
    process = start(run_dir)
    process.join()
    assert process.exitcode == 0, f"the job failed with exit code {process.exitcode}"
    return time.perf_counter() - started


def kill_after(run_dir: Path, run: int, seconds: float) -> Kill | None:
    """Start or resume, and kill after `seconds`; None if the job was done before."""
    process = start(run_dir)
    process.join(seconds)
    if process.exitcode is not None:
        assert process.exitcode == 0, f"the job failed with exit code {process.exitcode}"
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if (run_dir / "report.html").exists():  # the last thing that a run writes: it ended in the same moment
        return None
    rows = records(run_dir / "metrics.jsonl")
    checkpoints = sorted(path.parent.name for path in run_dir.glob("checkpoints/step-*/COMPLETE.json"))
    return Kill(
        run=run,
        after_s=round(seconds, 3),
        step=rows[-1]["step"] if rows else 0,
        depth=rows[-1]["depth"] if rows else SETTINGS["n_layer"],
        checkpoint=checkpoints[-1] if checkpoints else None,
        unfinished=sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob(".*")),
    )


def records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a record that may end in the middle of one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timings(entry) for key, entry in value.items() if key not in TIMINGS}
    return [without_timings(entry) for entry in value] if isinstance(value, list) else value


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each thing that kills must not change: weights, layer states, records but for times."""
    files = [Path("final/model.safetensors"), Path("samples.jsonl"), Path("lineage.json")]
    files += [path.relative_to(run_dir) for path in sorted(run_dir.glob("layers/*/*.safetensors"))]
    contents = {str(path): (run_dir / path).read_bytes() for path in files}
    for name in ("metrics.jsonl", "events.jsonl"):
        rows = [row for row in records(run_dir / name) if row.get("event") != "resume"]
        contents[name] = json.dumps(without_timings(rows)).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def different(first: dict[str, str], second: dict[str, str]) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def kill_and_resume(folder: Path, num_kills: int, seed: int) -> dict[str, Any]:
    whole = folder / "whole"
    prepare_data()
    seconds = finish(whole)
    expected, growths = fingerprint(whole), records(whole / "events.jsonl")
    print(f"undisturbed: {seconds:.0f} s, growths at {[event['step'] for event in growths]}", flush=True)
    chance, kills, differences = random.Random(seed), list[Kill](), list[list[str]]()
    # On average a process gets through a thirteenth of the job, less its start and what it repeats.
    longest = 2 * seconds / 13
    while len(kills) < num_kills or len(differences) <= kills[-1].run:
        run_dir = folder / f"killed-{len(differences)}"
        kill = None
        if len(kills) < num_kills:
            kill = kill_after(run_dir, len(differences), chance.uniform(0.0, longest))
        else:
            finish(run_dir)
        if kill is None:
            differences.append(different(expected, fingerprint(run_dir)))
        else:
            kills.append(kill)
            print(f"kill {len(kills)}: after {kill.after_s:.2f} s, step {kill.step}", flush=True)
    return {
        "undisturbed_s": round(seconds, 1),
        "growths": [{key: e[key] for key in ("step", "depth_before", "depth_after")} for e in growths],
        "kills": [asdict(kill) for kill in kills],
        "runs": len(differences),
        "different": differences,
        "equal": not any(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_resume.json")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    told = about(seeds=[arguments.seed])
    with tempfile.TemporaryDirectory(prefix="aiether-kills-") as folder:
        measured = kill_and_resume(Path(folder), arguments.kills, arguments.seed)
    results = told | {"settings": SETTINGS} | measured
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    verdict = "equal to the undisturbed run in every bit" if results["equal"] else results["different"]
    job_size = f"{results['runs']} run(s) of {len(results['growths'])} growths"
    print(f"{arguments.kills} kills over {job_size}: {verdict}")


if __name__ == "__main__":
    main()
elif __name__ == JOB_NAME:
    job(globals()["RUN_DIR"])
