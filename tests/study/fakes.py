"""A place for runs that writes records instead of training, and observers that remember."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aiether.study.arms import Cell
from aiether.study.cell import Outcome
from aiether.study.pool import Order

Loss = Callable[[str, float, int], float]


def write_records(folder: Path, *, loss: float, settings: dict[str, Any], flops: int, depth: int = 2) -> None:
    """The records of a finished run, one evaluation long."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = settings["max_steps"] * 128
    row = {"kind": "eval", "step": settings["max_steps"], "eval_loss": loss, "bits_per_byte": loss / 2}
    row |= {"tokens": tokens, "flops": flops, "depth": depth, "elapsed_s": flops / 1e6}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "events.jsonl").write_text("")
    (folder / "config.yaml").write_text("{}\n")
    (folder / "environment.json").write_text(
        json.dumps({"commit": "abc", "processor": "a processor", "data": {"fingerprint": "f"}})
    )
    (folder / "result.json").write_text(json.dumps({"eval_loss": loss, "steps": row["step"]}))
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))


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
        steps = order.settings["max_steps"]
        flops = steps * (1000 if condition == "static" else 600)
        loss = self.loss(condition, length, seed) if "-lr" not in leaf else self._tuned(leaf)
        write_records(order.folder, loss=loss, settings=dict(order.settings), flops=flops)
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

    def started(self, cell: Cell) -> None: ...

    def ended(self, cell: Cell, outcome: Outcome, metric: float | None, seconds: float) -> None:
        self.ended_cells.append((cell, outcome))

    def preparing(self, phase: str, fraction: float) -> None: ...

    def tick(self) -> None: ...
