"""Throws bad configurations, flags, texts and damaged run folders at the commands, by the thousand.

    python benchmarks/fuzz.py [--examples 2000] [--out benchmarks/results/fuzz.json]

Every example must end in success, or in one line on stderr and exit status 2 (3 where the numbers of a run
became infinite): never in a traceback, an empty message or a hang. Examples are drawn by hypothesis without
randomness of their own, so that two runs on one version draw the same; configurations that happen to be valid
train for two steps. The commands run in this process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
import yaml
import zstandard
from hypothesis import strategies as st

from _machine import about
from aiether.cli import main as aiether
from aiether.training.config import setting_types

_TESTS = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "training" / "tiny_run.py"))
as_flags: Callable[[Mapping[str, Any]], list[str]] = _TESTS["as_flags"]
TINY: dict[str, Any] = _TESTS["TINY_RUN"] | {
    "max_steps": 2,
    "num_epochs": 0.02,  # what is left where an example takes max_steps away
    "batch_size": 2,
    "eval_batches": 1,
    "validation_fraction": 0.2,
    "eval_interval_steps": 1,
    "save_interval_steps": 1,
}
SIZES = {
    "max_steps",
    "max_tokens",
    "max_flops",
    "max_seconds",
    "num_epochs",
    "n_layer",
    "n_embd",
    "n_head",
    "context_length",
    "batch_size",
}
SIZES |= {"max_layers", "grow_to", "grow_by", "vocab_size", "gradient_accumulation_steps"}
SIZES |= {"history_window_size", "compile", "baseline", "eval_batches"}
"""Settings for which no valid value but a tiny one is drawn."""
OWN = {"output_dir", "cache_dir", "dataset_path"}
"""Settings that an example sets itself, or the disk fills with folders of odd names."""
SEED = 0
"""Of the text that the examples start from; hypothesis draws without a seed."""
STATUSES = (0, 2, 3)
TIMEOUT_S = 60
KINDS = {"config": 0.3, "flags": 0.3, "data": 0.2, "damage": 0.2}
"""Share of the examples."""


class Hang(BaseException):
    """An example took too long; no Exception, so that nothing on the way takes it for its own."""


@dataclass
class Outcome:
    """What a command did: its status, and its complaint if that is not as it should be."""

    status: int | None
    fault: str | None
    said: str


@dataclass
class Tally:
    """What came of the examples of one kind."""

    examples: int = 0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, example: str, outcome: Outcome) -> None:
        self.examples += 1
        self.statuses[str(outcome.status)] += 1
        if outcome.fault is not None:
            self.failures.append(
                {"example": example[:2000], "fault": outcome.fault, "said": outcome.said[:500]}
            )


def run(arguments: list[str]) -> Outcome:
    """Run a command in this process and judge how it ended."""
    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _time_limit():
            status = aiether(arguments)
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever comes out is a finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        return Outcome(None, fault[:500], err.getvalue())
    return Outcome(status, _fault(status, err.getvalue()), err.getvalue())


def _fault(status: int, said: str) -> str | None:
    lines = [line for line in said.splitlines() if ": warning: " not in line]
    if status not in STATUSES:
        return f"exit status {status}"
    if "Traceback" in said:
        return "a traceback on stderr"
    if status == 0:
        return f"success that says {lines[0]!r} on stderr" if lines else None
    if len(lines) != 1:
        return f"{len(lines)} lines on stderr instead of one"
    program, _, message = lines[0].partition(": ")
    return (
        None if program.startswith("aiether") and len(message) > 10 else "a line that does not explain itself"
    )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """By the processor's time, so that a busy machine is no hang; by the clock, ten times as long."""
    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}

    def stop(*_: object) -> None:
        raise Hang(f"no end within {TIMEOUT_S} s")

    before = {number: signal.signal(number, stop) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S)
    signal.setitimer(signal.ITIMER_REAL, 10 * TIMEOUT_S)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


# -- what is drawn ----------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None,
    True,
    False,
    "",
    " ",
    "x",
    "\0",
    "~nobody-here/x",
    "1e",
    "nan",
    "-inf",
    "0x1",
    "None",
]
HOSTILE += [-1, 10**15, 10**40, -(10**40), 1e300, -0.5, float("nan"), float("inf"), [], [1, "x"], [[1]], {}]
HOSTILE += [{"a": 1}, "../..", "é" * 40, "a" * 5000, "<script>alert(1)</script>", "\u202e", "2020-01-01"]
GENTLE: list[Any] = [1, 2, 3, 0.1, 0.5, 1e-3, "copy", "zero", "random", "noise", "geometric", "stack", "top"]
GENTLE += [
    "front",
    "interleave",
    "adamw",
    "muon",
    "llama",
    "gpt2",
    "fixed",
    "never",
    "plateau",
    "report",
    "none",
]
GENTLE += ["host", "disk", "auto", "unit", "all", "wsd", "cosine", "linear", "gradual", "stop", "skip", "cpu"]
TYPES = setting_types()
NAMES = sorted(TYPES.keys() - OWN)


def any_value(name: str) -> st.SearchStrategy[Any]:
    """A value for a setting: mostly one that is wrong, and never a valid one that takes long."""
    gentle = [value for value in GENTLE if name not in SIZES]
    gentle += [TINY[name]] if name in TINY else []
    return st.sampled_from(HOSTILE) | st.sampled_from(gentle) if gentle else st.sampled_from(HOSTILE)


SETTINGS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: any_value(name) for name in names})
)
YAML_LINES = [
    b"lr: 1\nlr: 2\n",
    b"lr:\t1\n",
    b"\tlr: 1\n",
    b"a: &a [1,1,1]\nb: &b [*a,*a]\nlr: *b\n",
    b"lr: &x [*x]\n",
    b"lr: !!python/object/apply:os.system ['exit 7']\n",
    b"lr: !!int ''\n",
    b"lr: !!float ''\n",
    b"lr: !!timestamp x\n",
    b"lr: !!bool x\n",
    b"lr: !!binary '#'\n",
    b"<<: {lr: 1}\n",
    b"<<: 3\n",
    b"? [a]\n: 1\n",
    b"--- 1\n--- 2\n",
    b"%YAML 9.9\n---\nlr: 1\n",
    b"lr: 2020-99-99\n",
    b"yes: 1\n",
    b"n_layer: 1:30:00\n",
    b"[" * 3000,
    b"{" * 3000,
    b"- " * 3000,
    b"\xff\xfe",
    b"\0",
    b"lr: " + b"9" * 6000 + b"\n",
    b"rate: 1\n",
    b"learning_rate: 1\n",
    b"n-layer: 1\nn_layer: 1\n",
    b"# nothing\n",
    b"|",
    b"lr: |\n  1\n",
    b"\xef\xbb\xbflr: 0.001\n",
]


def config_bytes() -> st.SearchStrategy[bytes]:
    """YAML: tiny settings with some of them spoilt, or with lines in them that are traps."""
    spoilt = SETTINGS.map(lambda values: yaml.safe_dump({**TINY, **values}).encode())
    trapped = st.sampled_from(YAML_LINES).map(lambda line: yaml.safe_dump(TINY).encode() + line)
    alone = st.sampled_from(YAML_LINES)
    flipped = st.tuples(st.integers(0, 2**32), st.integers(1, 4)).map(
        lambda how: damage(yaml.safe_dump(TINY).encode(), random.Random(how[0]), how[1])
    )
    return spoilt | spoilt | trapped | alone | flipped | st.binary(max_size=60)


def flag_words() -> st.SearchStrategy[list[str]]:
    """Words of a command line."""
    names = st.sampled_from([*NAMES, "preset", "config", "resume", "help", "x", "", "n", "no_lr", "no-bf16"])
    text = st.sampled_from([str(value) for value in HOSTILE]).filter(lambda word: not word.startswith("--"))
    pair = names.flatmap(
        lambda name: st.tuples(
            st.just(name),
            any_value(name).map(str) if name in TYPES else text,
            st.sampled_from(["--{} {}", "--{}={}", "--{}", "-{}", "{}", "--no-{}", "--{} {} {}"]),
        )
    ).map(lambda drawn: drawn[2].replace("{}", "\1").replace("\1", drawn[0], 1).replace("\1", drawn[1]))
    return st.lists(pair, min_size=1, max_size=3).map(lambda pairs: [w for p in pairs for w in _words(p)])


def _words(pair: str) -> list[str]:
    """`--name value` as two words; a value may hold spaces and stays one."""
    flag, separator, value = pair.partition(" ")
    return [flag, value] if separator and flag.startswith("--") and "=" not in flag else [pair]


def damage(content: bytes, chance: random.Random, times: int) -> bytes:
    """Cut, flip, insert, repeat or blank bytes."""
    data = bytearray(content)
    for _ in range(times):
        where = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                del data[where:]
            case 1 if data:
                data[min(where, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 2:
                data[where:where] = chance.randbytes(chance.randrange(1, 9))
            case 3:
                del data[where : where + chance.randrange(1, 40)]
            case 4:
                data[where:where] = data[max(0, where - 30) : where]
            case _:
                data[where : where + 4] = bytes(4)
    return bytes(data)


# -- the examples -----------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The folder that examples work in: a text, its cache, and runs to damage."""

    root: Path
    finished: Path = Path()
    interrupted: Path = Path()

    def prepare(self) -> None:
        chance = random.Random(SEED)
        words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(60)]
        documents = (" ".join(chance.choices(words, k=30)) for _ in range(60))
        self.text.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
        self.finished, self.interrupted = self.root / "finished", self.root / "interrupted"
        outcome = run(["train", *self.flags(TINY, self.finished)])
        assert outcome.status == 0, outcome
        shutil.copytree(self.finished, self.interrupted)
        for name in ("result.json", "summary.json", "report.html"):  # as a kill before the end leaves it
            (self.interrupted / name).unlink()
        for newest in sorted((self.interrupted / "checkpoints").iterdir())[-1:]:
            shutil.rmtree(newest)

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def out(self) -> Path:
        """A folder that is not there."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        return self.root / "out"

    def flags(self, settings: dict[str, Any], out: Path, text: Path | None = None) -> list[str]:
        own = {"dataset_path": text or self.text, "output_dir": out, "cache_dir": self.root / "cache"}
        return as_flags({**settings, **own})

    def config(self, content: bytes) -> Outcome:
        file = self.root / "config.yaml"
        file.write_bytes(content)
        names = ("n_embd", "n_head", "max_steps", "num_epochs", "context_length", "vocab_size")
        small = {name: TINY[name] for name in names}
        given = {name: value for name, value in small.items() if f"{name}:".encode() not in content}
        return run(["train", "--config", str(file), *self.flags(given, self.out)])

    def command_line(self, words: list[str]) -> Outcome:
        command = ("train", "train", "generate", "report")[len("".join(words)) % 4]
        if command == "train":
            return run(["train", *self.flags(TINY, self.out), *words])
        if command == "generate":
            return run(["generate", str(self.finished), "ab", "--max_new_tokens", "2", *words])
        return run(["report", str(self.finished), *words])

    def data(self, seed: int) -> Outcome:
        chance = random.Random(seed)
        place = self.root / "data"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return run(["train", *self.flags(TINY, self.out, write_data(place, self.text.read_bytes(), chance))])

    def damaged(self, seed: int) -> Outcome:
        """A file of a run damaged, and then one of the commands that read it."""
        chance = random.Random(seed)
        run_dir = self.root / "damaged"
        shutil.rmtree(run_dir, ignore_errors=True)
        command = chance.choice(("resume", "generate", "report"))
        shutil.copytree(self.interrupted if command == "resume" else self.finished, run_dir)
        for file in chance.sample(
            sorted(f for f in run_dir.rglob("*") if f.is_file()), k=chance.randint(1, 2)
        ):
            if chance.random() < 0.1:
                file.unlink()
            else:
                file.write_bytes(damage(file.read_bytes(), chance, chance.randint(1, 3)))
        if command == "resume":
            return run(["train", "--resume", str(run_dir)])
        if command == "generate":
            return run(["generate", str(run_dir), "ab", "--max_new_tokens", "2", "--device", "cpu"])
        return run(["report", str(run_dir)])


def write_data(place: Path, text: bytes, chance: random.Random) -> Path:
    """A dataset of any kind that the reader takes, spoilt or whole; returns what to name as its path."""
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".txt": bytes,
        ".py": bytes,
        ".md": bytes,
        ".txt.gz": gzip.compress,
        ".txt.xz": lzma.compress,
        ".txt.zst": zstandard.ZstdCompressor().compress,
        ".gz": bytes,
        ".xz": bytes,
        ".zst": bytes,
        ".jsonl": lambda data: b"".join(
            json.dumps({"text": t}).encode() + b"\n" for t in data.decode().split("\n")
        ),
        ".csv": lambda data: b"text\n" + data.replace(b" ", b","),
        ".bin": bytes,
        ".parquet": bytes,
        "": bytes,
    }
    if chance.random() < 0.2:
        return _write_saved(place / "saved", text, chance)
    for index in range(chance.randint(1, 2)):
        suffix = chance.choice(sorted(packers))
        content = packers[suffix](chance.choice([text, text, text[: chance.randrange(400)], b"", b"\n \n"]))
        if chance.random() < 0.6:
            content = damage(content, chance, chance.randint(1, 3))
        (place / f"{index}{suffix}").write_bytes(content)
    if chance.random() < 0.2:
        (place / "loop.txt").symlink_to("loop.txt")
    files = sorted(place.iterdir())
    return chance.choice([files[0], files[0], place, place / "*", place / "**" / "*.txt", place / "none"])


def _as_json_lines(data: bytes) -> bytes:
    return b"".join(json.dumps({"text": line}).encode() + b"\n" for line in data.decode().split("\n"))


def _write_saved(folder: Path, text: bytes, chance: random.Random) -> Path:
    import datasets

    datasets.disable_progress_bars()
    lines = text.decode().split("\n")
    column: list[Any] = chance.choice([lines, [1] * 9, [None] * 9, [[1, 2]] * 9, []])
    name = chance.choice(["text", "text", "input_ids", "other"])
    datasets.Dataset.from_dict({name: column}).save_to_disk(folder)
    if chance.random() < 0.6:
        file = chance.choice(sorted(f for f in folder.iterdir() if f.is_file()))
        file.write_bytes(damage(file.read_bytes(), chance, chance.randint(1, 3)))
    return folder


def fuzz(bench: Bench, examples: Mapping[str, int], say: Callable[[str], None] = print) -> dict[str, Tally]:
    """Draw and judge as many examples of each kind."""
    seeds = st.integers(0, 2**48)
    drawn: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Outcome]]] = {
        "config": (config_bytes(), bench.config),
        "flags": (flag_words(), bench.command_line),
        "data": (seeds, bench.data),
        "damage": (seeds, bench.damaged),
    }
    tallies = {kind: Tally() for kind in KINDS}
    for kind, (strategy, judge) in drawn.items():
        started = time.perf_counter()
        _draw(strategy, examples[kind], judge, tallies[kind])
        tally = tallies[kind]
        say(
            f"{kind}: {tally.examples} examples, {dict(tally.statuses)}, {len(tally.failures)} failures, "
            f"{time.perf_counter() - started:.0f} s"
        )
    return tallies


def _draw(
    strategy: st.SearchStrategy[Any], examples: int, judge: Callable[[Any], Outcome], tally: Tally
) -> None:
    """Hypothesis draws; nothing is raised, so that one failure does not hide the next."""

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
            hypothesis.HealthCheck.large_base_example,
        ],
    )
    @hypothesis.given(strategy)
    def example(drawn: Any) -> None:
        tally.add(repr(drawn), judge(drawn))

    example()


@contextlib.contextmanager
def open_bench() -> Iterator[Bench]:
    """A bench in a folder of its own, which is the current one meanwhile and goes away at the end."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="aiether-fuzz-") as root:
        os.chdir(root)
        try:
            bench = Bench(Path(root))
            bench.prepare()
            yield bench
        finally:
            os.chdir(here)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fuzz.json")
    options = parser.parse_args()
    out = options.out.resolve()
    torch.set_num_threads(1)
    told, started = about(seeds=[SEED], more_versions=["hypothesis"]), time.perf_counter()
    with open_bench() as bench:
        tallies = fuzz(bench, {kind: round(options.examples * share) for kind, share in KINDS.items()})
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    result = told | {
        "examples": sum(tally.examples for tally in tallies.values()),
        "failures": failures,
        "kinds": {
            kind: {"examples": tally.examples, "exit_statuses": dict(sorted(tally.statuses.items()))}
            for kind, tally in tallies.items()
        },
        "elapsed_s": round(time.perf_counter() - started, 1),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{result['examples']} examples, {len(failures)} failures: {out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
