"""The weights of a folder that somebody else may have written: safetensors inside it, and nothing else.

transformers follows the file names of an index wherever they lead, and unpickles a shard whose name does not
end in .safetensors, also when it was told to use safetensors. So the folder is looked at before it sees it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_weights(folder: Path) -> int:
    """How many tensors the safetensors files of a model folder hold.

    Raises
    ------
    ValueError
        If there are none (pickled ones are not read), if the index or a header is damaged, or if a name leads
        out of the folder.
    """
    _check_named(folder)
    return sum(_count(folder / name) for name in _shards(folder))


def is_plain_name(name: Any) -> bool:
    """Whether a name read from a file stays in the folder that it is put together with."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def _check_named(folder: Path) -> None:
    """`transformers_weights` in config.json may name another file than the usual one."""
    if not (folder / "config.json").is_file():  # weights alone are weights too
        return
    config = read_mapping(folder / "config.json")
    named = config.get("transformers_weights")
    if named is not None and not (is_plain_name(named) and named.endswith(".safetensors")):
        raise ValueError(
            f"{folder / 'config.json'} names the weights {named!r}: only a safetensors file in the same "
            "folder is read"
        )


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; ValueError names a file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged (no JSON): restore it, or use another folder") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): restore it, or use another folder")
    return content


def _shards(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(_no_weights(folder))
    named = read_mapping(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{folder / INDEX} is damaged (it has no weight_map): restore it")
    shards = sorted({str(name) for name in named.values()})
    for name in shards:
        if not (is_plain_name(name) and name.endswith(".safetensors")):
            raise ValueError(
                f"{folder / INDEX} names the shard {name!r}: only safetensors files in the same folder are "
                "read; do not trust this folder"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its index names: copy the whole model")
    return shards


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if not pickled:
        return f"{str(folder)!r} holds no weights ({WEIGHTS} is missing); name a folder of save_pretrained"
    return (
        f"{str(folder)!r} holds no {WEIGHTS}, only {', '.join(pickled[:3])}, which can run code when it is "
        "loaded and is not read; if you trust it, load it elsewhere and save it with save_pretrained"
    )


def _count(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as tensors:
            return len(tensors.keys())
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged ({reason}): copy or download it again") from error
