"""States of single layers on disk, as the reference keeps them: L0 at birth, L1 before the next growth.

One safetensors file a state, its metadata in the file's own header: one atomic rename writes both, so a
reader never sees weights with another state's metadata.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"layer-(\d+)")
_KEY = "aiether_layer_state"


@dataclass(frozen=True, order=True)
class LayerStateInfo:
    """One saved state: the layer's id, the state's name, the step at which it was taken, and its file."""

    layer_id: int
    state_name: str
    step: int
    path: Path


class LayerStateManager:
    """Saves and loads the states of single layers under `output_dir/layer-000/L0.safetensors`.

    Parameters
    ----------
    output_dir: folder for the states; created when the first one is saved.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)

    def path_of(self, layer_id: int, state_name: str) -> Path:
        """The file of a state, whether it exists or not."""
        if isinstance(layer_id, bool) or not isinstance(layer_id, int) or layer_id < 0:
            raise ValueError(f"layer_id is {layer_id!r}: a whole number from 0 is meant")
        if not _NAME.fullmatch(state_name):
            raise ValueError(
                f"state_name is {state_name!r}: use letters, digits, '.', '_' and '-', as in 'L0'"
            )
        return self.output_dir / f"layer-{layer_id:03d}" / f"{state_name}.safetensors"

    def save_state(self, layer_id: int, state_name: str, state_dict: Mapping[str, Tensor], step: int) -> Path:
        """Write one layer's tensors; an earlier state of that name is replaced whole or not at all.

        Parameters
        ----------
        layer_id: the layer's id in the lineage.
        state_name: `L0`, `L1` or any other plain name.
        state_dict: tensors by name, of any shape and dtype; they may share storage and lie on any device.
        step: optimizer steps done.

        Raises
        ------
        ValueError
            For an empty state, an entry that is no tensor, or a name that is no plain file name.
        """
        path = self.path_of(layer_id, state_name)
        if not state_dict:
            raise ValueError(f"the state {state_name!r} of layer {layer_id} is empty: nothing would be saved")
        strange = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
        if strange:
            raise ValueError(f"state_dict holds entries that are no tensors: {strange}; save tensors only")
        metadata = {"layer_id": layer_id, "state_name": state_name, "step": int(step)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(
                {
                    name: value.detach().to("cpu", copy=True).contiguous()
                    for name, value in state_dict.items()
                },
                temporary,
                metadata={_KEY: json.dumps(metadata)},
            )
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
        return path

    def load_state(self, layer_id: int, state_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`(state_dict, metadata)` of a saved state: CPU tensors; layer_id, state_name and step.

        Raises
        ------
        ValueError
            If there is no such state, or the file was not written by this class.
        """
        path = self.path_of(layer_id, state_name)
        if not path.is_file():
            have = ", ".join(f"{info.layer_id}/{info.state_name}" for info in self.list_states()) or "none"
            raise ValueError(
                f"no state {state_name!r} of layer {layer_id} in {self.output_dir} (saved: {have})"
            )
        with safe_open(path, framework="pt") as tensors:
            metadata = _metadata(tensors.metadata(), path)
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, metadata  # noqa: SIM118

    def list_states(self) -> list[LayerStateInfo]:
        """All saved states, by layer and name."""
        found: list[LayerStateInfo] = []
        for path in sorted(self.output_dir.glob("layer-*/*.safetensors")):
            if _FOLDER.fullmatch(path.parent.name) and not path.name.startswith("."):
                with safe_open(path, framework="pt") as tensors:
                    metadata = _metadata(tensors.metadata(), path)
                found.append(
                    LayerStateInfo(metadata["layer_id"], metadata["state_name"], metadata["step"], path)
                )
        return sorted(found)


def _metadata(header: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    if not header or _KEY not in header:
        raise ValueError(f"{path} is no layer state of aiether's: its header has no {_KEY!r} entry")
    return json.loads(header[_KEY])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
