"""The run folder's records (metrics, events, samples, lineage), continued exactly after a resume."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from aiether.evaluation import bits_per_byte, flops_per_token
from aiether.growth import Lineage, block_tensors, family_of
from aiether.integrations import Row, RunObserver, is_disk_full, write_json

from ._gaps import with_gap
from .layer_states import LayerStateManager
from .samples import Sampler


class JsonLines:
    """An append-only file of one JSON object a line that can be cut back to a remembered length.

    Rows that the disk has no room for are kept in `unwritten` and written as soon as there is some: a full
    disk under the records is no reason to stop training. They travel in the checkpoints meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[str] = []
        self._file = path.open(
            "ab", buffering=0
        )  # a buffer would keep what failed, and fail again on closing
        self._size = self._file.seek(0, os.SEEK_END)

    def append(self, row: Row) -> None:
        self.unwritten.append(json.dumps(row))
        self.flush()

    def flush(self) -> OSError | None:
        """Write what waits; returns what the disk said if it had no room."""
        try:
            while self.unwritten:
                line = self.unwritten[0].encode() + b"\n"
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._size += len(line)
                self.unwritten.pop(0)
        except OSError as error:
            if not is_disk_full(error):
                raise
            with suppress(OSError):  # a device is not cut back
                self._file.truncate(self._size)  # no half of a line
            return error
        return None

    def size(self) -> int:
        """Bytes on the disk, synced."""
        with suppress(OSError):  # a device is not synced
            os.fsync(self._file)
        return self._size

    def truncate(self, size: int, unwritten: Sequence[str] = ()) -> int | None:
        """Go back to a remembered length, and to the rows that waited then.

        Returns None, or the step after which rows are missing if the file was cut or edited since. A row in
        their place says so from then on.
        """
        before_gap = None if self._ends_a_line(size) else self._mark_gap(size)
        self._file.truncate(size)
        self._size = size
        self.unwritten = list(unwritten)
        self.flush()
        return before_gap

    def _ends_a_line(self, size: int) -> bool:
        with self.path.open("rb") as file:
            file.seek(max(size - 1, 0))
            return size == 0 or file.read(1) == b"\n"

    def _mark_gap(self, size: int) -> int:
        kept, row, before_gap = with_gap(self.path.read_bytes(), size)
        self._file.truncate(len(kept))
        if self._file.write(row) < len(row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return before_gap

    def close(self) -> None:
        self._file.close()


class Recorder(RunObserver):
    """Writes every row with the budget spent so far, and hands it on to a display.

    Tokens and FLOPs are counted per optimizer step; FLOPs include the output head and attention, forward
    and backward, as if nothing were frozen.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        context_length: int,
        batch_size: int,
        tokens_per_step: int,
        total_steps: int,
        bytes_per_token: float | None,
        config: Row | None = None,
        emit: Callable[[str, Row], None],
        sampler: Sampler | None = None,
    ) -> None:
        self.config = config  # what the run is trained under: every checkpoint tells
        self.run_dir, self.context_length, self.tokens_per_step = run_dir, context_length, tokens_per_step
        self.batch_size = batch_size
        self.bytes_per_token, self.total_steps, self.emit = bytes_per_token, total_steps, emit
        self.layers = LayerStateManager(run_dir / "layers")
        self.metrics, self.events = JsonLines(run_dir / "metrics.jsonl"), JsonLines(run_dir / "events.jsonl")
        self.sampler, self.samples = sampler, JsonLines(run_dir / "samples.jsonl")
        self.tokens, self.flops, self.flops_per_step, self.step = 0, 0, 0, 0
        self.last_sample_step = -1
        self.last_log: tuple[int, float] = (0, 0.0)  # (step, train_seconds) of the last training row
        self.last_eval: Row = {}
        self._said_full = False
        self._lineage: Lineage | None = None

    def on_stage(self, *, stage: int, step: int, model: PreTrainedModel, lineage: Lineage) -> None:
        self.step = step
        per_token = flops_per_token(model.config, self.context_length, self.batch_size)
        self.flops_per_step = per_token * self.tokens_per_step
        self._lineage = lineage
        self._write_lineage()
        self._save_layers(step, model, lineage)
        self.emit("stage", {"stage": stage, "step": step, "depth": lineage.depth})

    def _write_lineage(self) -> None:
        if self._lineage is not None:
            content = self._lineage.to_dict() | {"steps": self.total_steps}
            write_json(self.run_dir / "lineage.json", content)

    def _plan(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._write_lineage()
        self.emit("total", {"total_steps": total_steps})

    def on_stage_end(self, *, step: int, model: PreTrainedModel, grows: bool) -> None:
        """What the model of this depth had to say at its end, before it grows or is done."""
        if self.sampler is None or not (grows or step >= self.total_steps) or step == self.last_sample_step:
            return  # the last: resumed after the sample, before the run's end was on record
        row = {"step": step, "depth": model.config.num_hidden_layers, "prompt": self.sampler.prompt}
        row["text"] = self.sampler.sample(model)
        if (trace := self.sampler.trace(model, row["text"])) is not None:
            row["trace"] = trace
        self.samples.append(row)
        self._tell_if_full()
        self.last_sample_step = step
        self.emit("sample", row)

    def _save_layers(self, step: int, model: PreTrainedModel, lineage: Lineage) -> None:
        """At a birth: L0 of what is born, L1 of what stood before (it comes through unchanged)."""
        born = [record.born_step == step for record in lineage.records]
        if not any(born):
            return
        tensors = model.state_dict()
        blocks = block_tensors(tensors, family_of(model))
        for names, record, new in zip(blocks.values(), lineage.records, born, strict=True):
            state = {suffix: tensors[name] for suffix, name in names.items()}
            self.layers.save_state(record.id, "L0" if new else "L1", state, step)

    def on_step(self, step: int, train_seconds: float) -> None:
        self.tokens += self.tokens_per_step
        self.flops += self.flops_per_step
        self.step = step
        self.emit("step", {"step": step, "train_seconds": train_seconds})

    def on_log(self, row: Row) -> None:
        step, seconds = row["step"], row.pop("train_seconds")
        steps, elapsed = step - self.last_log[0], seconds - self.last_log[1]
        self.last_log = (step, seconds)
        rate = steps / elapsed if elapsed > 0 else None
        tokens_rate = rate and rate * self.tokens_per_step
        self._write("train", row | {"steps_per_s": rate, "tokens_per_s": tokens_rate} | self._budget(seconds))

    def on_evaluate(self, row: Row) -> None:
        seconds = row.pop("train_seconds")
        bits = self.bytes_per_token and bits_per_byte(row["eval_loss"], 1, self.bytes_per_token)
        self.last_eval = row | {"bits_per_byte": bits} | self._budget(seconds)
        self._write("eval", self.last_eval)

    def on_event(self, event: Row) -> None:
        if event["event"] == "probe":  # forks are paid for like any training, and no training row's rate
            self.flops += event["flops"]
            self.last_log = (self.last_log[0], self.last_log[1] + event["seconds"])
        if event["event"] == "replan":
            self._plan(event["total_steps"])
        self.events.append(event)
        self._tell_if_full()
        self.emit(event["event"], event)

    def _tell_if_full(self) -> None:
        waiting = [lines.path.name for lines in self._lines if lines.unwritten]
        if waiting and not self._said_full:
            rows = f"rows of {' and '.join(waiting)} wait in memory"
            self.emit("warning", {"text": f"the disk is full: {rows}; free some space in {self.run_dir}"})
        self._said_full = bool(waiting)

    @property
    def _lines(self) -> tuple[JsonLines, ...]:
        return self.metrics, self.events, self.samples

    def _budget(self, seconds: float) -> Row:
        return {"tokens": self.tokens, "flops": self.flops, "elapsed_s": seconds}

    def _write(self, kind: str, row: Row) -> None:
        row = {"kind": kind, **row}
        self.metrics.append(row)
        self._tell_if_full()
        self.emit(kind, row)

    def state(self) -> dict[str, Any]:
        return {
            "metrics_size": self.metrics.size(),
            "events_size": self.events.size(),
            "samples_size": self.samples.size(),
            "last_sample_step": self.last_sample_step,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "last_log": list(self.last_log),
            "last_eval": self.last_eval,
            "config": self.config,
            "unwritten": {lines.path.name: lines.unwritten for lines in self._lines if lines.unwritten},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.last_sample_step = state["last_sample_step"]
        self._plan(state["total_steps"])
        self.tokens, self.flops, self.last_eval = state["tokens"], state["flops"], state["last_eval"]
        step, seconds = state["last_log"]
        self.last_log = (step, seconds)
        for lines, size in zip(self._lines, ("metrics_size", "events_size", "samples_size"), strict=True):
            before_gap = lines.truncate(state[size], state["unwritten"].get(lines.path.name, ()))
            if before_gap is not None:
                self._tell_gap(lines.path, before_gap, saved_at=self.tokens // self.tokens_per_step)

    def _tell_gap(self, path: Path, before: int, saved_at: int) -> None:
        """Weights and data are whole, so the run goes on; not all that it was up to here is on record."""
        text = (
            f"{path} was cut or edited since the checkpoint of step {saved_at}: rows after step {before} are"
        )
        self.emit("warning", {"text": f"{text} missing; the training goes on, and the report will say so"})

    def write_all(self) -> None:
        """Write what waits for room on the disk.

        Raises
        ------
        OSError
            If there still is none.
        """
        for lines in self._lines:
            error = lines.flush()
            if error is not None:
                raise OSError(error.errno, error.strerror, str(lines.path))

    def close(self) -> None:
        for lines in self._lines:
            lines.close()
