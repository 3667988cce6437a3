"""A large text through `aiether.data.prepare`: anonymous memory, throughput, and a kill on the way.

    python benchmarks/data_large.py --megabytes 200 1000

For each size a text is made from the standard library's source, with variation; a child process prepares it
and its anonymous memory (RssAnon of /proc/PID/status) is sampled. The child is killed (SIGKILL) once while it
tokenises and started again; at the first size the result is compared with that of an uninterrupted child.
Memory is flat if the sizes differ and the peaks do not. Writes benchmarks/results/data_large.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

from _machine import about, anonymous_bytes

RESULT = Path(__file__).parent / "results" / "data_large.json"
_SAMPLE_S = 0.1
_KILL_AT = 0.5


def make_text(path: Path, size: int) -> int:
    """Write about `size` bytes of real text, varied so that no two copies of a file are equal."""
    from aiether.data.sources import standard_library

    originals = [
        file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for file in standard_library().paths
    ]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for number in count():
            lines = originals[number % len(originals)].copy()
            for line in range(number % 37, len(lines), 37):
                lines[line] = lines[line].rstrip("\n") + f"  # {number}.{line}\n"
            written += file.write("".join(lines)) + file.write("\n<|endoftext|>\n")
            if written >= size:
                break
    return path.stat().st_size


def child(text: Path, cache: Path) -> None:
    """Prepare a text and print what came out, with the seconds of each phase, as one line of JSON."""
    from aiether.data import DataConfig, prepare

    marks: dict[str, list[float]] = {}

    written = 0.0

    def progress(phase: str, fraction: float) -> None:
        nonlocal written
        now = time.monotonic()
        marks.setdefault(phase, [now, now])[1] = now
        if now - written >= _SAMPLE_S:  # it is called for every few kilobytes
            written = now
            (cache / "progress").write_text(f"{phase} {fraction:.4f}")

    data = prepare(DataConfig(dataset_path=str(text), cache_dir=str(cache)), progress)
    phases = {phase: round(end - start, 2) for phase, (start, end) in marks.items()}
    print(
        json.dumps(
            {"fingerprint": data.fingerprint, "tokens": data.train_tokens + data.validation_tokens}
            | {"seconds": phases}
        )
    )


def run_child(text: Path, cache: Path, *, kill: bool) -> dict[str, Any]:
    """One child process to its end, or to the kill in the middle of tokenising."""
    cache.mkdir(exist_ok=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(text), str(cache)], stdout=subprocess.PIPE, text=True
    )
    peak, killed = 0, False
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        if kill and past_kill_point(cache / "progress"):
            process.send_signal(signal.SIGKILL)
            killed = True
            break
        time.sleep(_SAMPLE_S)
    printed, _ = process.communicate()
    if not killed and process.returncode:
        raise SystemExit(f"the child ended with status {process.returncode}")
    outcome = {"wall_s": round(time.monotonic() - start, 1), "peak_anonymous_mb": round(peak / 2**20)}
    return outcome | (json.loads(printed) if printed else {"killed_at": _KILL_AT})


def past_kill_point(progress: Path) -> bool:
    """Whether the child is tokenising and past the share at which it is to be killed."""
    words = progress.read_text().rsplit(maxsplit=1) if progress.is_file() else []
    return len(words) == 2 and words[0] == "tokenising" and float(words[1]) >= _KILL_AT


def measure(megabytes: int, folder: Path, *, compare: bool) -> dict[str, Any]:
    """One size: killed once and resumed; with `compare` also uninterrupted."""
    text = folder / f"{megabytes}.txt"
    size = make_text(text, megabytes * 10**6)
    first = run_child(text, folder / f"killed-{megabytes}", kill=True)
    second = run_child(text, folder / f"killed-{megabytes}", kill=False)
    wall_s = first["wall_s"] + second["wall_s"]
    row: dict[str, Any] = {
        "bytes": size,
        "tokens": second["tokens"],
        "killed": first,
        "resumed": second,
        "peak_anonymous_mb": max(first["peak_anonymous_mb"], second["peak_anonymous_mb"]),
        "megabytes_per_s": round(size / 1e6 / wall_s, 2),
    }
    if compare:
        whole = run_child(text, folder / f"whole-{megabytes}", kill=False)
        row |= {
            "uninterrupted": whole,
            "equal_to_uninterrupted": whole["fingerprint"] == second["fingerprint"],
        }
    text.unlink()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--folder", type=Path, help="where texts and caches go; default: a temporary folder")
    parser.add_argument("--commit", default=None, help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path, nargs=2, metavar=("TEXT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    where = about(seeds=[], more_versions=["tokenizers"], commit=arguments.commit)  # nothing is drawn
    result: dict[str, Any] = where | {"rows": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number, megabytes in enumerate(arguments.megabytes):
            result["rows"].append(measure(megabytes, Path(folder), compare=number == 0))
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(result["rows"][-1], indent=2), flush=True)


if __name__ == "__main__":
    main()
