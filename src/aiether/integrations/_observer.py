"""What a run tells its watchers: plain dictionaries at fixed moments, for files, displays and trackers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from aiether.growth import Lineage

Row = dict[str, Any]


class RunObserver:
    """Base of everything that watches a run. Every method may be left as it is."""

    def on_stage(self, *, stage: int, step: int, model: PreTrainedModel, lineage: Lineage) -> None:
        """A stage starts: fixed architecture, fixed trainable set."""

    def on_stage_end(self, *, step: int, model: PreTrainedModel, grows: bool) -> None:
        """A stage is over: `grows` says that the model now grows; else it changes phase, ends or pauses.

        What is written here belongs to the checkpoint that follows. The clock of training stands still.
        """

    def on_log(self, row: Row) -> None:
        """Training figures: step, loss, grad_norm, learning_rate, depth, stage, train_seconds (so far)."""

    def on_step(self, step: int, train_seconds: float) -> None:
        """An optimizer step is done."""

    def on_evaluate(self, row: Row) -> None:
        """An evaluation is done: step, eval_loss, eval_seconds, geometry, stagnation, depth, stage."""

    def on_event(self, event: Row) -> None:
        """A growth, a change of phase, a resume."""

    def state(self) -> dict[str, Any]:
        """JSON that the checkpoint carries, so that a resumed run's files continue exactly."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned when the checkpoint was written."""
