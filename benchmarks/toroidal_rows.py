"""The rows of a toroidal study on other texts, with both evaluators.

    aiether study run toroidal_table --preset gpu --set dataset_path=... --output_dir TABLE
    python benchmarks/toroidal_rows.py TABLE --tokenizer DIR --texts wikitext-2=test.txt wikipedia=valid.txt

The study has to keep its models (keep_models: true). Each of them and the one that it began with is
evaluated on each text: documents joined, windows side by side, every token once. On the first text the
legacy evaluator stands beside it, lines padded to 256 tokens and padding counted, with labels shifted once
and twice: numbers to hold against the reference's own, nothing else (--legacy_lines 0 leaves it out, and
--bf16 computes the others as the study did). Writes
benchmarks/results/toroidal_rows.json after every model; models that it holds already are not run again.
With --workers so many models are evaluated at a time, each in a process of its own, on the GPUs in
turn.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from _machine import about
from aiether.study.runner import gpus
from aiether.training.evaluate import evaluate
from aiether.training.legacy import evaluate_legacy

RESULT = Path(__file__).parent / "results" / "toroidal_rows.json"
BASE = "before"


def models(study: Path) -> dict[tuple[str, int], Path]:
    """Each kept model by arm and seed; the one that the study began with is `before`, of no seed."""
    found = {(BASE, -1): study / "base" / "final"}
    for path in sorted(study.glob("cells/*/*/final")):
        found[path.parts[-3], int(path.parts[-2].rpartition("seed")[2])] = path
    return found


def take_gpu(turns: Any) -> None:
    """As a process begins: the GPU that it has, of those that there are in turn."""
    if (gpu := turns.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def row(path: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    common: dict[str, Any] = {"device": settings.device, "tokenizer": settings.tokenizer}
    found: dict[str, Any] = {"perplexity": {}, "loss": {}, "legacy": {}}
    for name, text in settings.texts.items():
        seen = evaluate(
            path,
            dataset_path=text,
            context_length=settings.context_length,
            batch_size=settings.batch_size,
            parity_tokens=0,
            bf16=settings.bf16,
            **common,
        )
        found["perplexity"][name], found["loss"][name] = seen.perplexity, seen.loss
    if settings.legacy_lines == 0:
        return found
    first = next(iter(settings.texts.values()))
    for label, twice in (("single shift", False), ("double shift", True)):
        legacy = evaluate_legacy(
            path,
            dataset_path=first,
            double_shift=twice,
            lines=settings.legacy_lines,
            context_length=min(256, settings.context_length),
            batch_size=settings.batch_size,
            **common,
        )
        found["legacy"][label] = legacy.legacy_exp
    return found


def show(content: dict[str, Any]) -> str:
    """A table: means over seeds."""
    texts = list(content["texts"])
    columns = [f"perplexity, {name}" for name in texts]
    columns += [f"legacy, {texts[0]}, {label}" for label in content["rows"][0]["legacy"]]
    lines = [f"| arm | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for arm in dict.fromkeys(each["arm"] for each in content["rows"]):
        rows = [each for each in content["rows"] if each["arm"] == arm]
        numbers = [fmean(each["perplexity"][name] for each in rows) for name in texts]
        numbers += [fmean(each["legacy"][label] for each in rows) for label in rows[0]["legacy"]]
        lines.append(f"| {arm} | {len(rows)} | {' | '.join(f'{number:,.2f}' for number in numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--texts", nargs="+", required=True, help="NAME=PATH")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--legacy_lines", type=int, help="the first so many lines of the first text; default all; 0: none"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="evaluate in bfloat16; the legacy one stays float32"
    )
    parser.add_argument("--seeds", type=int, help="at most so many of each arm")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=RESULT)
    settings = parser.parse_args()
    settings.texts = dict(each.split("=", 1) for each in settings.texts)
    content: dict[str, Any] = {
        **about(seeds=[], commit=settings.commit),
        "study": settings.study.name,
        "texts": list(settings.texts),
        "context_length": settings.context_length,
        "legacy_lines": settings.legacy_lines,
        "bf16": settings.bf16,
        "rows": [],
    }
    if settings.out.exists():
        earlier = json.loads(settings.out.read_text(encoding="utf-8"))
        alike = ("study", "texts", "context_length", "legacy_lines", "bf16")
        if any(earlier.get(name, False) != content[name] for name in alike):
            raise SystemExit(
                f"{settings.out} holds rows of another study, text or evaluation: move it, or choose --out"
            )
        content["rows"] = earlier["rows"]
    held = {(each["arm"], each["seed"]) for each in content["rows"]}
    wanted = {
        key: path
        for key, path in models(settings.study).items()
        if key not in held and (settings.seeds is None or key[1] < settings.seeds)
    }
    context = get_context("spawn")
    turns = context.Queue()
    ids = [] if settings.device == "cpu" else gpus({})
    for worker in range(settings.workers):
        turns.put(ids[worker % len(ids)] if ids else None)
    with ProcessPoolExecutor(settings.workers, context, initializer=take_gpu, initargs=(turns,)) as pool:
        begun = {pool.submit(row, path, settings): key for key, path in wanted.items()}
        for ended in as_completed(begun):
            arm, seed = begun[ended]
            content["rows"].append({"arm": arm, "seed": seed, **ended.result()})
            content["rows"].sort(key=lambda each: (each["arm"] != BASE, each["arm"], each["seed"]))
            content["seeds"] = sorted({each["seed"] for each in content["rows"]} - {-1})
            settings.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(arm, seed, ended.result()["perplexity"], flush=True)
    print(show(content))


if __name__ == "__main__":
    main()
