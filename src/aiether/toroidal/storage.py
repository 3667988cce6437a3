"""A retrofitted model on disk: what differs from the model that it was made of, or everything.

A folder of differences holds `toroidal.json` and `toroidal.safetensors`: the base model's name, a fingerprint
of the tensors that were taken from it, and every tensor that the base does not have or has otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

RECORD, TENSORS = "toroidal.json", "toroidal.safetensors"
"""The record is written last: without it a folder is not complete."""


def save_differences(model: Any, folder: str | Path, base: str | None = None) -> None:
    """Write what differs from the base model, which is loaded anew and compared tensor by tensor.

    Args:
        base: its folder or name; None: where the model was loaded from.

    Raises
    ------
    ValueError
        If the base is not known, or is another architecture.
    """
    base = base or model.config.toroidal.get("base") or model.config._name_or_path
    if not base:
        raise ValueError(
            "the model was not loaded from a folder or the Hub, so that there is nothing to store "
            "differences from: give base=, or save the whole model with save_pretrained(folder, whole=True)"
        )
    base = _place(base)
    state = _tensors(model)
    before = _tensors(AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True))
    missing = before.keys() - state.keys()
    if missing:
        raise ValueError(
            f"{base!r} has tensors that the model lacks, such as {min(missing)}: it is not what the model "
            "was made of"
        )
    changed = {name: tensor for name, tensor in state.items() if not _equal(tensor, before.get(name))}
    kept = sorted(before.keys() - changed.keys())
    folder = Path(folder)
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a whole model: choose another folder for what differs from one")
    folder.mkdir(parents=True, exist_ok=True)
    forget_differences(folder)
    _replace(folder / TENSORS, lambda path: save_file(changed, path))
    record = {
        "base": base,
        "fingerprint": fingerprint({name: before[name] for name in kept}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "toroidal": {**model.config.toroidal, "base": base},
    }
    _replace(folder / RECORD, lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8"))


def forget_differences(folder: str | Path) -> None:
    """Take the record out of a folder, which then holds no differences."""
    (Path(folder) / RECORD).unlink(missing_ok=True)


def _place(base: str) -> str:
    """A folder by its whole path; a name on the Hub as it is."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model that `save_pretrained` of a retrofitted model wrote, whole or as differences.

    Args:
        kwargs: those of transformers' `from_pretrained`, as `dtype` and `device_map`.

    Raises
    ------
    ValueError
        If the folder is neither, or the base model is not the one that it was written for.
    """
    from .decoders import register_toroidal, retrofit

    folder = Path(folder)
    if not (folder / RECORD).is_file():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no model: neither {RECORD} nor config.json is there")
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not register_toroidal(held.get("model_type")):
            raise ValueError(
                f"{folder} holds a model of type {held.get('model_type')!r}, without toroidal layers: load "
                "it with transformers and call aiether.retrofit on it"
            )
        return AutoModelForCausalLM.from_pretrained(folder, **{"use_safetensors": True, **kwargs})
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    changed = load_file(folder / TENSORS)
    if Path(record["base"]).is_absolute() and not Path(record["base"]).is_dir():
        raise ValueError(
            f"the base model {record['base']!r} is not there any more: put it back, or write its new place "
            f'under "base" in {folder / RECORD}'
        )
    kwargs = {"dtype": record["dtype"], "use_safetensors": True, **kwargs}
    model = AutoModelForCausalLM.from_pretrained(record["base"], **kwargs)
    _check_base(model, record, changed, kwargs["dtype"])
    held = dict(record["toroidal"])
    layers, progress, base = held.pop("layers"), held.pop("progress"), held.pop("base")
    retrofit(model, layers=layers, **held)
    model.config.toroidal = {**model.config.toroidal, "base": base}
    absent = model.load_state_dict(changed, strict=False).unexpected_keys  # and each layer's progress
    assert not absent, absent
    model.config.toroidal = {**model.config.toroidal, "progress": progress}
    return model


def _check_base(
    model: PreTrainedModel, record: dict[str, Any], changed: dict[str, Tensor], dtype: Any
) -> None:
    """The base must be what it was; at another dtype it cannot be compared, and its names must do."""
    kept = {name: tensor for name, tensor in _tensors(model).items() if name not in changed}
    if str(dtype).removeprefix("torch.") == record["dtype"] and fingerprint(kept) != record["fingerprint"]:
        raise ValueError(
            f"the base model {record['base']!r} is not the one that was retrofitted: its weights have "
            "another fingerprint; restore it, or retrofit this one anew"
        )


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Weights and buffers that are saved; of tied ones the first name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if name not in tied}


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _replace(path: Path, write: Any) -> None:
    """Write beside, sync, rename."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
