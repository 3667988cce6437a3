"""Growing a distributed checkpoint: model, optimizer state and settings by fully qualified name."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aiether.growth import FROM_ZERO, new_moments, renames

from ._dcp import DistributedFolder, Entry, NewEntry, Place, write_distributed
from ._grown import GrownTensors

_GROUPS, _NAMES = "param_groups", "params"


def grown_entries(folder: DistributedFolder, grown: GrownTensors) -> dict[str, NewEntry]:
    """What the grown folder holds, in the order in which it is to be written.

    Every entry that names a tensor of the model moves with it: the tensor itself, its moments, its settings.
    Those of new tensors are made as `grown` and the growth's `moments` say. Entries that name none are passed
    on as they are.

    Raises
    ------
    ValueError
        If a list of parameter names cannot be read.
    """
    names = renames(folder.model, grown.plan, grown.family)
    model_keys = set(folder.model.keys_by_name.values())
    entries = {
        _renamed(folder.model.keys_by_name[old], old, name): NewEntry(
            _moved(folder.entries[folder.model.keys_by_name[old]].place, old, name),
            grown.spec(name),
            partial(grown.__getitem__, name),
        )
        for old, all_new in names.items()
        for name in all_new
    }
    entries = {key: entries[key] for key in _in_model_order(folder, grown, names)}
    for entry in folder.entries.values():
        if entry.key not in model_keys:
            entries |= _others(folder, entry, names, grown.growth.moments)
    return entries


def _in_model_order(
    folder: DistributedFolder, grown: GrownTensors, names: Mapping[str, Sequence[str]]
) -> list[str]:
    """Flat keys in the grown model's order, in which each new block is made once."""
    old_of = {new: old for old, all_new in names.items() for new in all_new}
    return [_renamed(folder.model.keys_by_name[old_of[name]], old_of[name], name) for name in grown]


def _others(
    folder: DistributedFolder, entry: Entry, names: Mapping[str, Sequence[str]], moments: Any
) -> dict[str, NewEntry]:
    """What becomes of an entry that is not the model's."""
    if entry.place[-1] == _NAMES and _GROUPS in entry.place:
        return {entry.key: NewEntry(entry.place, None, partial(_renamed_groups, folder, entry, names))}
    name = _named(entry.key, names)
    read = partial(_read, folder, entry)
    if name is None:
        return {entry.key: NewEntry(entry.place, entry.spec, read)}
    is_setting = any(str(word).partition(".")[0] == _GROUPS for word in entry.place)
    if moments == "reset" and not is_setting:
        return {}
    own, *new = names[name]
    kind = entry.key.rpartition(".")[2]
    if moments == "zero" and not is_setting and kind not in FROM_ZERO:
        raise ValueError(
            f"{entry.key} in {folder.path} is not known to start at zero: take moments 'copy' or 'reset'"
        )
    grown = {_renamed(entry.key, name, own): NewEntry(_moved(entry.place, name, own), entry.spec, read)}
    for fresh in new:
        make = read if is_setting else partial(_new_moment, read, kind, moments)
        grown[_renamed(entry.key, name, fresh)] = NewEntry(_moved(entry.place, name, fresh), entry.spec, make)
    return grown


def _read(folder: DistributedFolder, entry: Entry) -> Any:
    return folder.tensor(entry.key) if entry.spec else folder.raw(entry.key)


def _new_moment(read: Callable[[], Any], kind: str, moments: Any) -> Any:
    value = read()
    if not isinstance(value, bytes):
        return new_moments({kind: value}, moments)[kind]
    loaded = torch.load(io.BytesIO(value), weights_only=True)
    return _saved(new_moments({kind: loaded}, moments)[kind])


def _saved(value: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


def _named(key: str, names: Mapping[str, Any]) -> str | None:
    """The longest name of a model tensor that stands in a key."""
    words = key.split(".")
    found = [
        name
        for start in range(len(words))
        for end in range(start + 1, len(words) + 1)
        if (name := ".".join(words[start:end])) in names
    ]
    return max(found, key=len, default=None)


def _renamed(key: str, old: str, new: str) -> str:
    """The key with the last place where `old` stands as whole words replaced."""
    before, _, after = f".{key}.".rpartition(f".{old}.")
    return f"{before}.{new}.{after}".strip(".")


def _moved(place: Place, old: str, new: str) -> Place:
    moved = tuple(
        _renamed(word, old, new) if isinstance(word, str) and f".{old}." in f".{word}." else word
        for word in place
    )
    if moved == place and old != new:
        # A nested model: each word of the name is a level of its own.
        words, size = [str(word) for word in place], len(old.split("."))
        at = next(i for i in range(len(words)) if words[i : i + size] == old.split("."))
        moved = (*place[:at], *new.split("."), *place[at + size :])
    return moved


def _renamed_groups(folder: DistributedFolder, entry: Entry, names: Mapping[str, Sequence[str]]) -> bytes:
    """The names of a parameter group, with the new ones behind those that they are made from."""
    try:
        old = torch.load(io.BytesIO(folder.raw(entry.key)), weights_only=True)
        grown = [new for name in old for new in names.get(name, (name,))]
    except Exception as error:
        raise ValueError(
            f"{entry.key} in {folder.path} is no list of parameter names: save the optimizer with "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
        ) from error
    return _saved(grown)


def write_grown(
    target: Path, folder: DistributedFolder, grown: GrownTensors, wrote: Callable[[int], None]
) -> None:
    """Write the grown distributed checkpoint."""
    write_distributed(target, grown_entries(folder, grown), wrote)
