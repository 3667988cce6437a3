"""Folders of torch.distributed.checkpoint: read tensor by tensor in one process, and written again.

PyTorch's own reader unpickles the metadata, and its planner the objects beside the tensors, without looking.
Here the metadata may only name the classes that it consists of, tensors and settings are loaded with
`weights_only=True`, and whatever else lies there (data loaders, schedulers) is passed on unopened.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .._weights import is_plain_name
from ._tensors import Spec, StoredTensors

METADATA = ".metadata"

Place = tuple[Any, ...]
"""Where an entry stands in the nested state that was saved: keys, and positions in lists."""

_MODEL = frozenset({"model", "model_state", "model_state_dict", "module", "state_dict"})
_OPTIMIZER = frozenset({"optim", "optimizer", "optimizers", "optimizer_state_dict"})
_NOT_MODEL = _OPTIMIZER | {"ema", "ema_model"}
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "WindowsPath")),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Entry:
    """One entry of a distributed checkpoint: its flat key, its place, and its spec if it is a tensor."""

    key: str
    place: Place
    spec: Spec | None


class DistributedFolder:
    """A folder of torch.distributed.checkpoint, whole or sharded over any number of processes.

    Attributes
    ----------
    entries: everything in it, by flat key.
    model: the model's tensors under the names that they have in the model.

    Raises
    ------
    ValueError
        If the metadata is damaged, names a class that does not belong there or a file elsewhere, or no entry
        looks like a model's tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = _read_metadata(path)
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        places: Mapping[str, Place] = self._metadata.planner_data or {}
        self.entries = {
            key: Entry(key, tuple(places.get(key, (key,))), _spec(stored))
            for key, stored in self._metadata.state_dict_metadata.items()
        }
        self.model = _Model(self, _model_keys(self.entries))
        if not self.model:
            raise ValueError(f"{path} holds no model tensors: expected them under a key 'model'")

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds an optimizer's state."""
        words = {str(word).partition(".")[0] for entry in self.entries.values() for word in entry.place}
        return not _OPTIMIZER.isdisjoint(words)

    def tensor(self, key: str) -> Tensor:
        """One tensor, put together from its pieces; fresh memory."""
        spec = self.entries[key].spec
        assert spec is not None
        target = torch.empty(spec.shape, dtype=spec.dtype)
        self._read({key: target})
        return target

    def raw(self, key: str) -> bytes:
        """The bytes of an entry that is no tensor, unopened."""
        return self._read({key: None})[key]

    def _read(self, state: dict[str, Any]) -> dict[str, bytes]:
        planner = _RawPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, self._metadata, is_coordinator=True)
        plan = create_default_local_load_plan(state, self._metadata)
        try:
            self._reader.read_data(plan, planner).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{self.path} is damaged ({next(iter(state))}: {reason}): copy it again"
            ) from error
        return planner.raw


class _Model(StoredTensors):
    """The model's tensors in a distributed checkpoint, by their names in the model."""

    def __init__(self, folder: DistributedFolder, keys: Mapping[str, str]) -> None:
        self.folder, self.keys_by_name = folder, dict(keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys_by_name

    def __getitem__(self, name: str) -> Tensor:
        return self.folder.tensor(self.keys_by_name[name])

    def spec(self, name: str) -> Spec:
        spec = self.folder.entries[self.keys_by_name[name]].spec
        assert spec is not None
        return spec


class _RawPlanner(DefaultLoadPlanner):
    """The library's planner, except that what is no tensor is kept as bytes instead of being unpickled."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.raw: dict[str, bytes] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.raw[read_item.dest_index.fqn] = value.getvalue()


def _read_metadata(path: Path) -> Metadata:
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        assert isinstance(metadata, Metadata)
        names = {info.relative_path for info in metadata.storage_data.values()}
    except Exception as error:  # a pickle can fail in any way
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(
            f"{path / METADATA} is damaged or not what torch.distributed.checkpoint writes ({reason}): do "
            "not trust this folder"
        ) from error
    for name in names:
        if not is_plain_name(name):
            raise ValueError(
                f"{path / METADATA} names the file {name!r}, outside of its folder: do not trust this folder"
            )
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


def _spec(stored: Any) -> Spec | None:
    if not isinstance(stored, TensorStorageMetadata):
        return None
    return Spec(tuple(stored.size), stored.properties.dtype)


def _model_keys(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Name in the model -> flat key."""
    tensors = [entry for entry in entries.values() if entry.spec is not None]
    marked = {
        ".".join(map(str, entry.place[at + 1 :])): entry.key
        for entry in tensors
        if (at := _model_word(entry.place)) is not None
    }
    if marked:
        return marked
    return {entry.key: entry.key for entry in tensors if not _NOT_MODEL & set(entry.key.split("."))}


def _model_word(place: Place) -> int | None:
    """Where a place says that the rest of it is a name in the model."""
    for at, word in enumerate(place[:-1]):
        if word in _NOT_MODEL:
            return None
        if word in _MODEL:
            return at
    return None


Value = Callable[[], Tensor | bytes]


@dataclass(frozen=True)
class NewEntry:
    """An entry to write; its value is made when its turn comes."""

    place: Place
    spec: Spec | None
    value: Value


def write_distributed(folder: Path, entries: Mapping[str, NewEntry], wrote: Callable[[int], None]) -> None:
    """Write a folder that any number of processes can load, entry by entry in the mapping's order."""
    writer = _StreamingWriter(folder)
    planner = _LazyPlanner(entries, wrote)
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata=metadata, results=[results])


class _StreamingWriter(FileSystemWriter):
    """The library's writer, which holds all entries of a file in memory, but one entry at a time."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results: list[WriteResult] = []
        with (Path(self.path) / name).open("wb") as file:
            for item in plan.items:
                start, value = file.tell(), planner.resolve_data(item)
                if isinstance(value, Tensor):
                    torch.save(value, file)
                else:
                    file.write(value.getbuffer())
                length = file.tell() - start
                place = _StorageInfo(name, start, length)
                results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _LazyPlanner(DefaultSavePlanner):
    """Plans with shapes alone, and makes each value when it is written."""

    def __init__(self, entries: Mapping[str, NewEntry], wrote: Callable[[int], None]) -> None:
        super().__init__()
        self.entries, self.wrote = entries, wrote

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator
        self.mappings = {key: entry.place for key, entry in self.entries.items()}
        self.state_dict = {
            key: torch.empty(entry.spec.shape, dtype=entry.spec.dtype, device="meta") if entry.spec else None
            for key, entry in self.entries.items()
        }

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        entry = self.entries[write_item.index.fqn]
        value = entry.value()
        if write_item.type == WriteItemType.BYTE_IO:
            assert isinstance(value, bytes)
            return io.BytesIO(value)
        assert isinstance(value, Tensor)
        assert entry.spec == Spec(tuple(value.shape), value.dtype)
        self.wrote(value.nbytes)
        # What is saved is the whole storage: a view of a larger one becomes its own.
        return value.contiguous() if value.untyped_storage().nbytes() == value.nbytes else value.clone()
