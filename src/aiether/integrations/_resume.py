"""Which checkpoint a run goes on from, and the model in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ._checkpoint import Checkpoint, CheckpointStore
from ._quiet import without_progress_bars
from ._weights import check_weights, read_mapping

_ALIGNMENT = 64
"""Bytes, as torch allocates on a CPU."""


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
    """The model of a checkpoint, of `old`'s class and with its settings, on the CPU.

    Raises
    ------
    ValueError
        If the checkpoint is of another class, or its weights are not all that the model has, which
        `from_pretrained` would draw anew or leave out.
    """
    check_weights(checkpoint.path)
    _check_class(type(old).__name__, checkpoint)
    with without_progress_bars():
        loaded: Any = type(old).from_pretrained(
            checkpoint.path,
            use_safetensors=True,
            dtype=old.dtype,
            attn_implementation=old.config._attn_implementation,
            output_loading_info=True,
        )
    model, found = loaded  # annotated as the model alone
    _check_complete(found, checkpoint)
    _align(model)
    model.loss_type = old.loss_type
    return model


def _align(model: PreTrainedModel) -> None:
    """Copy what lies in the file's memory at another address than torch would have given it.

    A tensor of one number shifts all that follow it in the file, and the same products round otherwise there.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _check_class(name: str, checkpoint: Checkpoint) -> None:
    written = read_mapping(checkpoint.path / "config.json").get("architectures") or [name]
    if name not in written:
        raise ValueError(
            f"the checkpoint {checkpoint.path} holds a {', '.join(written)}, the Trainer a {name}: resume "
            "with a Trainer around a model of the class of the first start"
        )


def _check_complete(found: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """What `from_pretrained` says of the names; tied ones, which are written once, are not among them."""
    faults = {
        "missing_keys": "lacks",
        "unexpected_keys": "also holds",
        "mismatched_keys": "has other shapes for",
    }
    for key, verb in faults.items():
        if names := sorted(map(str, found.get(key, ()))):
            raise ValueError(
                f"the checkpoint {checkpoint.path} {verb} {len(names)} tensors of the model that its "
                f"configuration describes, first {names[0]!r}: it was written from a model that was changed "
                "after it was built. Start anew with a model that its configuration describes"
            )
