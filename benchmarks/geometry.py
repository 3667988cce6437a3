"""Speed and memory of the geometry against NumPy's full SVD, and what watching costs.

    python benchmarks/geometry.py [--threads 2] [--out benchmarks/results/geometry.json]

Each measurement runs in a process of its own, so that peak memory is its own too; the fastest of some
repetitions counts, since other load only ever adds time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _machine import about

if TYPE_CHECKING:
    from aiether.geometry.trajectory import Storage

# Some machines pin OpenBLAS to an old core type by these; NumPy would lose by it, and the comparison be
# unfair.
for _variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_variable, None)

NUM_SNAPSHOTS = 15
K = 10
SEED = 0
WIDTH = 768
GPT2_SMALL_BLOCK = {
    "ln_1.weight": (WIDTH,),
    "ln_1.bias": (WIDTH,),
    "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
    "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH),
    "attn.c_proj.bias": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "ln_2.bias": (WIDTH,),
    "mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
    "mlp.c_fc.bias": (4 * WIDTH,),
    "mlp.c_proj.weight": (4 * WIDTH, WIDTH),
    "mlp.c_proj.bias": (WIDTH,),
}
# 6 blocks of width 128: the size of model that a laptop trains.
SMALL_MODEL = {
    f"h.{layer}.{name}": tuple(size // 6 for size in shape)
    for layer in range(6)
    for name, shape in GPT2_SMALL_BLOCK.items()
}
MODELS = {"gpt2_small_block": GPT2_SMALL_BLOCK, "six_blocks_of_width_128": SMALL_MODEL}


def num_parameters(model: str) -> int:
    return sum(_product(shape) for shape in MODELS[model].values())


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def weights(model: str) -> Iterator[dict[str, Any]]:
    """Weights along a path like training's: a drift that slows down, under noise."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    point = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in MODELS[model].items()}
    drift = {name: 1e-3 * torch.randn(value.shape, generator=generator) for name, value in point.items()}
    for step in range(1000):
        for name, value in point.items():
            value += 0.9**step * drift[name] + 5e-4 * torch.randn(value.shape, generator=generator)
        yield point


def histories(model: str) -> dict[str, list[Any]]:
    path = weights(model)
    kept: dict[str, list[Any]] = {name: [] for name in MODELS[model]}
    for _ in range(NUM_SNAPSHOTS):
        for name, value in next(path).items():
            kept[name].append(value.clone())
    return kept


def fastest(work: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Wall and processor seconds of the fastest repetition, after one that warms up."""
    work()
    wall, processor = [], []
    for _ in range(repetitions):
        start, start_processor = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return {"elapsed_s": min(wall), "processor_s": min(processor)}


def resident_bytes(field: str) -> int:
    """VmRSS, what the process holds now, or VmHWM, the most that it held (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_extrapolation(model: str) -> dict[str, float]:
    from aiether.geometry import Extrapolator

    extrapolator, kept = Extrapolator(k_subspace=K), histories(model)
    # Libraries take memory at their first call; a small tensor lets them do so before it is counted.
    extrapolator.extrapolate([snapshot[:4] for snapshot in kept["ln_1.weight"]])
    ctypes.CDLL(None).malloc_trim(0)  # give back what building the histories freed, or it would serve unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes("VmRSS")
    results = [extrapolator.extrapolate(snapshots)[0] for snapshots in kept.values()]
    floats = (resident_bytes("VmHWM") - before) / 4 / num_parameters(model)
    del results
    times = fastest(lambda: [extrapolator.extrapolate(s) for s in kept.values()], 15)
    return {**times, "extra_floats_per_parameter": floats}


def measure_svd(model: str, dtype: str) -> dict[str, float]:
    """Only the decompositions, from velocity matrices that are already there."""
    import numpy as np

    from aiether.geometry import reference

    matrices = [
        reference.velocities([s.numpy() for s in snapshots]).astype(dtype)
        for snapshots in histories(model).values()
    ]
    return fastest(lambda: [np.linalg.svd(m, full_matrices=False) for m in matrices], 3)


def measure_watching(model: str, storage: Storage) -> dict[str, float]:
    """One snapshot into a full window, and the Gram rows of all tensors that it calls for."""
    from aiether.geometry import Trajectory, metrics_from_gram

    trajectory, path = Trajectory(NUM_SNAPSHOTS, storage), weights(model)
    trajectory.append(next(path), 0)
    append_s, gram_s, processor_s = [], [], []
    for step in range(1, NUM_SNAPSHOTS + 8):
        point = next(path)
        start, start_processor = time.perf_counter(), time.process_time()
        trajectory.append(point, step)
        appended = time.perf_counter()
        metrics_from_gram(trajectory.gram(trajectory.names))
        append_s.append(appended - start)
        gram_s.append(time.perf_counter() - appended)
        processor_s.append(time.process_time() - start_processor)
    full = slice(NUM_SNAPSHOTS, None)
    return {
        "append_s": min(append_s[full]),
        "gram_row_s": min(gram_s[full]),
        "processor_s": min(processor_s[full]),
    }


def run_alone(measurement: str, *arguments: str, threads: int) -> dict[str, float]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    command = [sys.executable, __file__, "--measure", measurement, *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(measurement, *arguments, f"{threads} thread(s):", result, flush=True)
    return result


def compare(model: str, threads: int) -> dict[str, Any]:
    ours = run_alone("extrapolation", model, threads=threads)
    svd = {dtype: run_alone("svd", model, dtype, threads=threads) for dtype in ("float32", "float64")}
    speedup = {
        dtype: {kind: svd[dtype][kind] / ours[kind] for kind in ("elapsed_s", "processor_s")} for dtype in svd
    }
    return {"threads": threads, "extrapolation": ours, "numpy_svd": svd, "speedup": speedup}


def measure_all(threads: int) -> dict[str, Any]:
    told = about(seeds=[SEED], more_versions=["numpy"])
    block = "gpt2_small_block"
    watching = {
        model: {
            storage: run_alone("watching", model, storage, threads=threads) for storage in ("device", "disk")
        }
        for model in MODELS
    }
    return told | {
        "num_snapshots": NUM_SNAPSHOTS,
        "k_subspace": K,
        "num_parameters": {model: num_parameters(model) for model in MODELS},
        "against_full_svd": [compare(block, count) for count in sorted({1, threads})],
        "watching": {"threads": threads, **watching},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "geometry.json")
    parser.add_argument("--measure", nargs="+", help="one measurement, in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        work: dict[str, Callable[..., dict[str, float]]] = {
            "extrapolation": measure_extrapolation,
            "svd": measure_svd,
            "watching": measure_watching,
        }
        print(json.dumps(work[arguments.measure[0]](*arguments.measure[1:])))
        return
    results = measure_all(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
