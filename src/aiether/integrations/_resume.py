"""Which checkpoint a run goes on from, and the model in it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ._checkpoint import Checkpoint, CheckpointStore
from ._quiet import without_progress_bars
from ._weights import check_weights


def find_checkpoint(
    store: CheckpointStore, resume: bool | str | Path
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The checkpoint to go on from, None to start; and those that were skipped, with the reasons."""
    if resume is False:
        if store.has_any():
            raise ValueError(
                f"{store.directory} holds checkpoints of an earlier run: go on with resume=True, or "
                "name another output_dir"
            )
        return None, {}
    if resume is True:
        found, damaged = store.newest()
        if found is None and damaged:
            listed = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
            raise ValueError(
                f"no checkpoint in {store.directory} is complete ({listed}); bring the files back "
                "from a copy, or start a new run"
            )
        return found, damaged
    path = Path(resume).resolve()
    for checkpoint in store.complete():
        if checkpoint.path.resolve() == path:
            reason = store.damage(checkpoint)
            if reason is not None:
                raise ValueError(f"the checkpoint {path} is damaged: {reason}; choose another one")
            return checkpoint, {}
    raise ValueError(f"resume={str(resume)!r} is no complete checkpoint of {store.directory}")


def load_model(old: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint, of `old`'s class and with its settings, on the CPU."""
    check_weights(checkpoint.path)
    with without_progress_bars():
        model = type(old).from_pretrained(
            checkpoint.path,
            use_safetensors=True,
            dtype=old.dtype,
            attn_implementation=old.config._attn_implementation,
        )
    model.loss_type = old.loss_type
    return model
