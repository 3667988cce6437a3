"""A retrofitted model on disk: what differs from the model that it was made of, or everything.

A folder of differences holds `toroidal.json` and `toroidal.safetensors`: the base model's name, a fingerprint
of the tensors that were taken from it, and every tensor that the base does not have or has otherwise. One
that is the base's in another type is not among them: the base is loaded in the type of most numbers of the
model, and tensors that have other types are cast, as the record says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from .architecture import check_in_memory

RECORD, TENSORS = "toroidal.json", "toroidal.safetensors"
"""The record is written last: without it a folder is not complete."""
SUFFIX = "_toroidal"
"""Of the model type of a whole one."""
_OF_CLASSES = ("architectures", "dtype", "model_type", "toroidal", "transformers_version", "_name_or_path")
"""Entries of a configuration that say which class it is of and where it came from."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OF_DOWNLOADS = ("token", "cache_dir", "local_files_only", "force_download")
_AS_WRITTEN: dict[str, Any] = {
    "push_to_hub": False,
    "max_shard_size": "50GB",
    "safe_serialization": True,
    "variant": None,
    "token": None,
    "save_peft_format": True,
    "save_original_format": True,
    "distributed_checkpoint": False,
}
"""Arguments of transformers' `save_pretrained`, and what holds of them in a folder of differences."""


def save_differences(
    model: Any,
    folder: str | Path,
    base: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    **asked: Any,
) -> None:
    """Write what differs from the base model, which is loaded anew and compared tensor by tensor.

    Args:
        base: its folder or name; None: where the model was loaded from.
        state_dict: whole; None: the model's own.
        asked: further arguments of transformers' `save_pretrained`.

    Raises
    ------
    ValueError
        If the base is not known, cannot be loaded, or is another architecture or of other shapes, and for an
        argument that only a whole model has.
    """
    _check_asked(asked)
    base = base or model.config.toroidal.get("base") or model._made_of
    if not base:
        raise ValueError(
            "the model was not loaded from a folder or the Hub, so that there is nothing to store "
            "differences from: give base=, or save the whole model with save_pretrained(folder, whole=True)"
        )
    base = _place(base)
    state = _tensors(model, state_dict)
    dtype = main_dtype(state)
    plain = _loaded_base(base, dtype)
    before = _tensors(plain)
    _check_tensors(base, before, state)
    changed = {name: tensor for name, tensor in state.items() if not _equal(tensor, before.get(name))}
    folder = Path(folder)
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a whole model: choose another folder for what differs from one")
    folder.mkdir(parents=True, exist_ok=True)
    forget_differences(folder)
    _replace(folder / TENSORS, lambda path: save_file(changed, path))
    if model.can_generate():
        _replace(folder / GENERATION_CONFIG_NAME, lambda path: _write_generation(model, path))
    usual = {name: before[name].dtype if name in before else torch.float32 for name in state}
    record = {
        "base": base,
        "fingerprint": fingerprint({name: before[name] for name in before.keys() - changed.keys()}),
        "dtype": _word(dtype),
        "dtypes": {name: _word(t.dtype) for name, t in state.items() if t.dtype != usual[name]},
        "toroidal": {**model.config.toroidal, "base": base},
        "config": _other_settings(model, plain),
    }
    _replace(folder / RECORD, lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8"))


def _check_asked(asked: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        if name not in _AS_WRITTEN or value != _AS_WRITTEN[name]:
            raise ValueError(
                f"save_pretrained was given {name}={value!r}, which is for whole models: what differs from a "
                "base is one file in a folder; leave it out, or save the whole model with whole=True"
            )


def _loaded_base(base: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ValueError(
            f"the base model {base!r}, from which differences are stored, cannot be loaded: give its present "
            "place as base=, or save the whole model with save_pretrained(folder, whole=True)"
        ) from error


def _other_settings(model: Any, plain: PreTrainedModel) -> dict[str, Any]:
    """What the model's configuration has otherwise than its base's, as JSON holds it."""
    given, there = (json.loads(json.dumps(each.config.to_dict(), default=str)) for each in (model, plain))
    return {
        name: value for name, value in given.items() if name not in _OF_CLASSES and value != there.get(name)
    }


def _check_tensors(base: str, before: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the model has the base's tensors in their shapes, and terms beside them."""
    beside = [name for name in state.keys() - before.keys() if ".torus." not in name]
    if beside:
        raise ValueError(
            f"the model has tensors that {base!r} lacks, such as {min(beside)}: merge adapters into it "
            "first, or save the whole model with save_pretrained(folder, whole=True)"
        )
    missing = before.keys() - state.keys()
    if missing:
        raise ValueError(
            f"{base!r} has tensors that the model lacks, such as {min(missing)}: it is not what the model "
            "was made of"
        )
    for name, tensor in before.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)}, and {tuple(tensor.shape)} in {base!r}, whose "
                "configuration is the one that differences are loaded with: save the whole model with "
                "save_pretrained(folder, whole=True)"
            )


def _write_generation(model: Any, path: Path) -> None:
    """Generation settings as they are; transformers would refuse some only after a model is all written."""
    settings = json.loads(model.generation_config.to_json_string())
    settings.pop("compile_config", None)  # which it does not store either
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def forget_differences(folder: str | Path) -> None:
    """Take the differences out of a folder, the record first, without which there are none."""
    for name in (RECORD, TENSORS):
        (Path(folder) / name).unlink(missing_ok=True)


def _place(base: str) -> str:
    """A folder by its whole path; a name on the Hub as it is."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def is_toroidal(folder: str | Path) -> bool:
    """Whether a folder holds a model with toroidal layers, whole or as differences."""
    folder = Path(folder)
    return (folder / RECORD).is_file() or str(_model_type(folder)).endswith(SUFFIX)


def _model_type(folder: Path) -> str | None:
    """As a whole model's configuration says; None where there is none."""
    config = folder / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model that `save_pretrained` of a retrofitted model wrote, whole or as differences.

    Args:
        folder: a folder, or a name on the Hub (`owner/name`), whose configuration and safetensors are
            downloaded once.
        kwargs: those of transformers' `from_pretrained`, as `dtype` and `device_map`. `revision`, `token`,
            `cache_dir`, `local_files_only` and `force_download` go to the name on the Hub; all but `revision`
            to the base model too, which has that of its own.

    Raises
    ------
    ValueError
        If the folder is neither or damaged, a name on the Hub cannot be had, or the base model is not the one
        that it was written for. Where it is loaded in another type than it was saved in, or quantized, it is
        loaded once before in its own, to be compared.
    """
    if "torch_dtype" in kwargs:  # as transformers called it once, and still takes it
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    folder = _local(folder, kwargs)
    if not (folder / RECORD).is_file():
        return _load_whole(folder, **{"use_safetensors": True, **kwargs})
    return _load_differences(folder, **kwargs)


def _load_differences(folder: Path, **kwargs: Any) -> PreTrainedModel:
    from .decoders import retrofit

    if kwargs.get("output_loading_info"):
        raise ValueError("output_loading_info is not told of what differs from a base: leave it out")
    record, changed = _read(folder)
    if Path(record["base"]).is_absolute() and not Path(record["base"]).is_dir():
        raise ValueError(
            f"the base model {record['base']!r} is not there any more: put it back, or write its new place "
            f'under "base" in {folder / RECORD}'
        )
    kwargs = {"dtype": record["dtype"], "use_safetensors": True, **kwargs}
    as_saved = str(kwargs["dtype"]).removeprefix("torch.") == record["dtype"]
    as_saved = as_saved and kwargs.get("quantization_config") is None
    if not as_saved:
        asked = {key: kwargs[key] for key in _OF_DOWNLOADS if key in kwargs}
        asked |= {"dtype": record["dtype"], "use_safetensors": True}
        _check_base(AutoModelForCausalLM.from_pretrained(record["base"], **asked), record, changed)
    settings = {} if "config" in kwargs else record.get("config", {})
    model = AutoModelForCausalLM.from_pretrained(record["base"], **{**settings, **kwargs})
    check_in_memory(model)
    if as_saved:
        _check_base(model, record, changed)
    held = dict(record["toroidal"])
    layers, progress, base = held.pop("layers"), held.pop("progress"), held.pop("base")
    retrofit(model, layers=layers, **held)
    model.config.toroidal = {**model.config.toroidal, "base": base}
    if as_saved:
        _cast(model, record.get("dtypes", {}))
    absent = model.load_state_dict(changed, strict=False).unexpected_keys  # and each layer's progress
    assert not absent, absent
    model.config.toroidal = {**model.config.toroidal, "progress": progress}
    if (folder / GENERATION_CONFIG_NAME).is_file() and "generation_config" not in kwargs:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors of a folder of differences."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record, load_file(folder / TENSORS)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is damaged: its {RECORD} or {TENSORS} cannot be read ({error}); copy the folder anew"
        ) from error


def _local(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """The folder of that name; one on the Hub as it lies in the cache, without its `revision` in `kwargs`."""
    folder = Path(name).expanduser()
    if not isinstance(name, str) or folder.exists() or not _HUB_NAME.fullmatch(name):
        return folder
    from .decoders import register_toroidal

    asked = {key: kwargs[key] for key in _OF_DOWNLOADS if key in kwargs}
    asked["revision"] = kwargs.pop("revision", None)
    found = _downloaded(name, [RECORD, "config.json", GENERATION_CONFIG_NAME], asked)
    if (found / RECORD).is_file():
        return _downloaded(name, [TENSORS], asked)
    if register_toroidal(_model_type(found)):
        return _downloaded(name, ["model*.safetensors", "model.safetensors.index.json"], asked)
    return found  # of which the caller says what it is


def _downloaded(name: str, patterns: list[str], asked: dict[str, Any]) -> Path:
    import huggingface_hub  # needed for a name alone

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **asked))
    except Exception as error:  # of several libraries: no such name, no rights, no network
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{name!r} is not a folder, and as a name on the Hub it cannot be downloaded ({reason.strip()}): "
            "check the name and the network"
        ) from error


def _load_whole(folder: Path, **kwargs: Any) -> PreTrainedModel:
    from .decoders import register_toroidal

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: neither {RECORD} nor config.json is there")
    model_type = _model_type(folder)
    if not register_toroidal(model_type):
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}, without toroidal layers: load "
            "it with transformers and call aiether.retrofit on it"
        )
    return _class_of(folder).from_pretrained(folder, **kwargs)


def _class_of(folder: Path) -> Any:
    """The class that a whole model was saved from, by the name in its configuration: heads differ."""
    from .decoders import toroidal_class_of

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in config.get("architectures") or ():
        plain = getattr(transformers, str(name).removeprefix("Toroidal"), None)
        if isinstance(plain, type) and issubclass(plain, PreTrainedModel):
            return toroidal_class_of(plain)
    return AutoModelForCausalLM


def _check_base(model: PreTrainedModel, record: dict[str, Any], changed: dict[str, Tensor]) -> None:
    """The base must be what it was; one that is asked for in another type cannot be compared."""
    kept = {name: tensor for name, tensor in _tensors(model).items() if name not in changed}
    if fingerprint(kept) != record["fingerprint"]:
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


def _tensors(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights and buffers that are saved; of tied ones the first name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    held: Mapping[str, Tensor] = model.state_dict() if state is None else state
    return {name: t.detach().cpu().contiguous() for name, t in held.items() if name not in tied}


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether it is the other in its own type."""
    return other is not None and torch.equal(tensor, other.to(tensor.dtype))


def main_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The floating type of most numbers, terms apart, which are in single precision."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and ".torus." not in name:
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(model: PreTrainedModel, dtypes: Mapping[str, str]) -> None:
    """Give tensors the types that they are recorded with, in place."""
    for name, word in dtypes.items():
        module, _, own = name.rpartition(".")
        tensor = getattr(model.get_submodule(module), own)
        tensor.data = tensor.data.to(getattr(torch, word))


def _replace(path: Path, write: Any) -> None:
    """Write beside, sync, rename."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
