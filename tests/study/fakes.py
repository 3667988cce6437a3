"""A place for runs that writes records instead of training, and observers that remember."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aiether.data import prepare
from aiether.evaluation import flops_per_token
from aiether.study.arms import Cell
from aiether.study.cell import Outcome, with_tuples
from aiether.study.pool import Order
from aiether.training.arms import model_settings
from aiether.training.config import TrainConfig, write_config
from aiether.training.model import model_config

Loss = Callable[[str, float, int], float]


def write_records(folder: Path, *, loss: float, settings: dict[str, Any]) -> None:
    """The records of a finished run: two evaluations, and a growth half way if it starts with one layer."""
    folder.mkdir(parents=True, exist_ok=True)
    steps, start = settings["max_steps"], settings["n_layer"]
    per_step = settings["batch_size"] * settings["context_length"]
    rows, flops = [], 0
    for step, depth, nats in ((steps // 2, start, loss + 1), (steps, max(start, 2), loss)):
        done = rows[-1]["step"] if rows else 0
        flops += (step - done) * per_step * cost(settings, depth)
        row = {"kind": "eval", "step": step, "eval_loss": nats, "bits_per_byte": nats / 2, "depth": depth}
        rows.append(row | {"tokens": step * per_step, "flops": flops, "elapsed_s": flops / 1e7})
    growth = {"event": "growth", "step": steps // 2, "depth_before": start, "depth_after": 2}
    events = [growth | {"loss_before": loss + 1, "loss_after": loss + 1.25}] if start == 1 else []
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "events.jsonl", events)
    config = TrainConfig(**with_tuples(settings))
    write_config(folder / "config.yaml", config)
    data = {"fingerprint": prepare(config).fingerprint}
    (folder / "environment.json").write_text(
        json.dumps({"commit": "abc", "processor": "a processor", "data": data})
    )
    (folder / "result.json").write_text(
        json.dumps({"eval_loss": loss, "steps": steps, "elapsed_s": rows[-1]["elapsed_s"]})
    )
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))


def cost(settings: dict[str, Any], depth: int) -> int:
    """FLOPs of a token at a depth."""
    shape = model_settings(TrainConfig(**with_tuples(settings)), depth, 300, None)
    return flops_per_token(model_config("gpt2", **shape), settings["context_length"])


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class FakeWorkers:
    """Finishes what it is given at once, unless `fails` says why not; `stop_at` runs end in an interrupt."""

    slots = 2

    def __init__(
        self, loss: Loss, fails: dict[str, list[str]] | None = None, stop_at: int | None = None
    ) -> None:
        self.loss, self.fails, self.stop_at = loss, fails or {}, stop_at
        self.orders: list[Order] = []
        self._waiting: deque[Order] = deque()

    def folders(self) -> list[str]:
        """What was submitted, in order."""
        return ["/".join(order.folder.parts[-2:]) for order in self.orders]

    def submit(self, order: Order) -> None:
        if self.stop_at is not None and len(self.orders) == self.stop_at:
            raise KeyboardInterrupt
        self.orders.append(order)
        self._waiting.append(order)

    def wait(self, timeout_s: float) -> Sequence[tuple[Order, Outcome]]:
        order = self._waiting.popleft()
        name = "/".join(order.folder.parts[-2:])
        if self.fails.get(name):
            return [(order, Outcome("failed", self.fails[name].pop(0)))]
        condition, leaf = order.folder.parts[-2:]
        length, seed = float(leaf.split("-")[0]), int(leaf.rpartition("seed")[2])
        loss = self.loss(condition, length, seed) if "-lr" not in leaf else self._tuned(leaf)
        write_records(order.folder, loss=loss, settings=dict(order.settings))
        return [(order, Outcome("finished"))]

    def _tuned(self, leaf: str) -> float:
        return 3.0 + abs(float(leaf.partition("lr")[2].rpartition("-seed")[0]) - 0.002)

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        while self._waiting:
            yield self._waiting.popleft(), Outcome("interrupted")

    def close(self) -> None:
        self._waiting.clear()


class Silent:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.ended_cells: list[tuple[Cell, Outcome]] = []
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def begin(self, total: Sequence[Cell], done: Sequence[Cell], cost: Callable[[Cell], float]) -> None:
        assert all(cost(cell) > 0 for cell in total)

    def ended(self, cell: Cell, outcome: Outcome, metric: float | None, seconds: float) -> None:
        self.ended_cells.append((cell, outcome))

    def preparing(self, phase: str, fraction: float) -> None: ...

    def tick(self) -> None: ...
