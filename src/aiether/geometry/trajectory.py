"""A rolling window of snapshots of named tensors, with the Gram matrices of their velocities.

`append` only copies: one pass over the new values. The rows of a Gram matrix that new snapshots call for
are computed when `gram` asks for them, each row once, in one pass over the window, so a tensor that nobody
asks about costs no more than its copy.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aiether.geometry.gram import TensorLike, as_tensor, chunk_length, chunks, compute_device, one_thread

Storage = Literal["device", "host", "disk"]


@dataclass
class _Block:
    """The windows of the tensors of one size whose rows lie together (`_together`), else of one tensor."""

    rows: Tensor  # (N, S, P): snapshot number c (counted from the first ever) lies in row c mod S
    # (N, S, S) float64 by row: products of the velocities that end in these rows. A velocity keeps its row
    # for as long as it is in the window, so each product is computed at one place by one call, and its bits
    # (on a CPU) depend neither on when it was asked for nor on what else the window holds.
    gram: Tensor


@dataclass
class _Ring:
    """The window of one tensor: its place in a block."""

    block: _Block
    index: int
    shape: torch.Size
    num_computed: int = field(default=1)  # velocities that end in a snapshot below this number are in `gram`

    @property
    def rows(self) -> Tensor:
        """(S, P)."""
        return self.block.rows[self.index]

    @property
    def gram(self) -> Tensor:
        """(S, S)."""
        return self.block.gram[self.index]


class Trajectory:
    """The last `window_size` snapshots of a fixed set of tensors.

    Args:
        window_size: S, the number of snapshots that are kept, at least 2.
        storage: where they lie: "device" beside the tensors, "host" in main memory, "disk" in a memory-mapped
            file that the operating system pages in and out.
        directory: with "disk", the folder on whose file system they lie (default: the system's temporary
            one). Nothing is left in it: the trajectory's lasting form is `state_dict` and `snapshot_items`.

    A snapshot costs one copy of the tensors; the window S times their memory, in their own dtype.
    """

    def __init__(self, window_size: int, storage: Storage = "device", directory: Path | None = None) -> None:
        if window_size < 2:
            raise ValueError(
                f"window_size is {window_size}, but a velocity needs 2 snapshots: give 2 or more"
            )
        if storage not in get_args(Storage):
            raise ValueError(f"storage is {storage!r}, allowed are {', '.join(get_args(Storage))}")
        self.window_size = window_size
        self.storage: Storage = storage
        self._directory = directory
        self._rings: dict[str, _Ring] = {}
        self._steps: list[int] = []
        self._count = 0  # snapshots ever taken since the window was last empty
        self._work: dict[torch.device, Tensor] = {}  # kept: new memory costs more than what is done in it

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps of the snapshots, oldest first."""
        return tuple(self._steps)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rings)

    @property
    def nbytes(self) -> int:
        """Bytes that the window takes, filled or not."""
        return sum(ring.rows.nbytes for ring in self._rings.values())

    def clear(self) -> None:
        """Forget everything; the next `append` may bring other tensors."""
        self._rings.clear()
        self._work.clear()
        self._steps.clear()
        self._count = 0

    def append(self, tensors: Mapping[str, TensorLike], step: int) -> None:
        """Copy the tensors into the window, in place of the oldest snapshot when it is full.

        Raises:
            ValueError: no tensors, or names, shapes or dtypes other than in the window, or a step that is not
                after the last one. The window is then as it was.
        """
        values = {name: as_tensor(value) for name, value in tensors.items()}
        if not values:
            raise ValueError("no tensors given: a snapshot needs at least one named tensor")
        if self._steps and step <= self._steps[-1]:
            raise ValueError(
                f"step {step} does not come after step {self._steps[-1]}: append in order, or clear()"
            )
        if not self._rings:
            self._rings = self._new_rings(values)
        self._check(values)
        if len(self._steps) == self.window_size:
            # Forgotten before its memory is reused: an interrupt in the copying then leaves a valid window.
            del self._steps[0]
        row = self._count % self.window_size
        rings = [self._rings[name] for name in values]
        places = [ring.block.rows[ring.index, row].view(ring.shape) for ring in rings]
        # On a GPU a few launches, not one a tensor.
        torch._foreach_copy_(places, list(values.values()))  # pyright: ignore[reportPrivateImportUsage]
        self._steps.append(step)
        self._count += 1

    def gram(self, names: str | Sequence[str]) -> Tensor:
        """The Gram matrix of the velocities of one tensor, or of several taken together.

        Several tensors are one point of the product space (technical report, Definition 1), whose inner
        product
        is the sum of theirs: so is the Gram matrix.

        Returns:
            (S-1, S-1) float64 on the CPU, S = len(self); (0, 0) below two snapshots.
        """
        selected = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        if not selected:
            raise ValueError(f"no names given: name one or more of {self._known()}")
        rings = [self._ring(name) for name in selected]
        self._complete(rings)
        total = torch.zeros(self.window_size, self.window_size, dtype=torch.float64)
        for block, members in _by_block(rings):
            if len(members) == len(block.gram):
                total += block.gram.sum(dim=0)
            else:
                for ring in members:
                    total += ring.gram
        index = [number % self.window_size for number in self._velocities()]
        return total[index][:, index]

    def snapshots(self, name: str) -> list[Tensor]:
        """The snapshots of one tensor, oldest first, in its shape and dtype.

        They are views into the window, valid until the next `append` or `clear`: clone what has to last.
        """
        ring = self._ring(name)
        first = self._count - len(self._steps)
        return [ring.rows[number % self.window_size].view(ring.shape) for number in range(first, self._count)]

    def snapshot_items(self, step: int) -> dict[str, Tensor]:
        """All tensors of the snapshot of one step, as views into the window (see `snapshots`)."""
        if step not in self._steps:
            raise ValueError(f"no snapshot of step {step}: the window holds {self._steps}")
        row = (self._count - len(self._steps) + self._steps.index(step)) % self.window_size
        return {name: ring.rows[row].view(ring.shape) for name, ring in self._rings.items()}

    def state_dict(self) -> dict[str, Any]:
        """All but the snapshots, in numbers, strings, lists and dicts that JSON keeps exactly.

        Together with `snapshot_items` of each of `steps` it restores the trajectory (`from_state`). It
        computes nothing, so saving does not change what follows.
        """
        first = self._count - len(self._steps)
        grams: dict[str, list[list[float]]] = {}
        for name, ring in self._rings.items():
            index = [n % self.window_size for n in self._velocities() if n < ring.num_computed]
            grams[name] = ring.gram[index][:, index].tolist()
        return {"window_size": self.window_size, "steps": list(self._steps), "first": first, "grams": grams}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        load: Callable[[int], Mapping[str, TensorLike]],
        *,
        storage: Storage = "device",
        directory: Path | None = None,
        device: torch.device | str | None = None,
    ) -> Trajectory:
        """The trajectory that gave `state`, bit for bit, also in all Gram matrices to come.

        Args:
            state: of `state_dict`, also after a round trip through JSON.
            load: the tensors of the snapshot of a step (what `snapshot_items` gave); called once a step.
            storage, directory: as in the constructor; they need not be the same as before.
            device: with storage "device", where the snapshots shall lie; default: where `load` puts them.

        Raises:
            ValueError: a snapshot does not hold the tensors that the state names.
        """
        trajectory = cls(int(state["window_size"]), storage, directory)
        trajectory._count = int(state["first"])
        grams: Mapping[str, list[list[float]]] = state["grams"]
        for step in state["steps"]:
            loaded = {name: as_tensor(value) for name, value in load(int(step)).items()}
            if set(loaded) != set(grams):
                raise ValueError(
                    f"the snapshot of step {step} holds other tensors than the trajectory's state: "
                    f"{_difference(loaded, grams)}; take both from the same checkpoint"
                )
            ordered = {name: loaded[name] if device is None else loaded[name].to(device) for name in grams}
            trajectory.append(ordered, int(step))
        for name, rows in grams.items():
            trajectory._restore(trajectory._rings[name], rows)
        return trajectory

    def _restore(self, ring: _Ring, rows: list[list[float]]) -> None:
        numbers = list(self._velocities())[: len(rows)]
        index = torch.tensor([number % self.window_size for number in numbers], dtype=torch.long)
        values = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(rows))
        ring.gram[index[:, None], index] = values
        ring.num_computed = self._count - len(self._steps) + 1 + len(rows)

    def _velocities(self) -> range:
        """Numbers of the snapshots in which a velocity of the window ends."""
        return range(self._count - len(self._steps) + 1, self._count)

    def _complete(self, rings: Sequence[_Ring]) -> None:
        """Compute the Gram rows of the velocities that arrived since the last call."""
        num_filled = min(self._count, self.window_size)
        computed: list[tuple[Tensor, list[int], Tensor]] = []
        for rows, gram, ends in self._due(rings):
            device = compute_device(rows)
            with one_thread(device):
                computed.append((gram, ends, _products(rows, num_filled, ends, self._workspace(device))))
        # Every tensor is under way before the first is waited for.
        for gram, ends, products in computed:
            for own, row in zip(ends, products.cpu().unbind(dim=1), strict=True):
                # Whole, though some entries belong to no velocity of the window: those are written again
                # before a velocity that they belong to is in it.
                gram[:, own] = row
                gram[:, :, own] = row
        for ring in rings:
            ring.num_computed = self._count

    def _due(self, rings: Sequence[_Ring]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """What has to be computed: rows (N, S, P), their Gram matrices, the rows in which velocities arrived.

        A block is taken whole if all of it is asked for.
        """
        for block, members in _by_block(rings):
            starts = {ring.num_computed for ring in members}
            if len(members) == len(block.rows) and len(starts) == 1:
                parts = [(block.rows, block.gram, starts.pop())]
            else:
                parts = [(ring.rows[None], ring.gram[None], ring.num_computed) for ring in members]
            for rows, gram, start in parts:
                ends = [n % self.window_size for n in self._velocities() if n >= start]
                if ends:
                    yield rows, gram, ends

    def _workspace(self, device: torch.device) -> Tensor:
        if device not in self._work:
            size = (2, self.window_size, chunk_length(self.window_size, device))
            self._work[device] = torch.zeros(size, dtype=torch.float64, device=device)
        return self._work[device]

    def _new_rings(self, values: Mapping[str, Tensor]) -> dict[str, _Ring]:
        rings: dict[str, _Ring] = {}
        for names in _of_one_size(values):
            like = values[names[0]]
            if self.storage == "device" and _together(like.device):
                size = (len(names), self.window_size, like.numel())
                blocks = [self._new_block(torch.empty(size, dtype=like.dtype, device=like.device))]
            else:
                blocks = [self._new_block(self._allocate(values[name])[None]) for name in names]
            places = [(block, index) for block in blocks for index in range(len(block.rows))]
            for name, (block, index) in zip(names, places, strict=True):
                rings[name] = _Ring(block, index, values[name].shape)
        return {name: rings[name] for name in values}

    def _new_block(self, rows: Tensor) -> _Block:
        size = (len(rows), self.window_size, self.window_size)
        return _Block(rows, torch.zeros(size, dtype=torch.float64))

    def _allocate(self, value: Tensor) -> Tensor:
        size = (self.window_size, value.numel())
        if self.storage == "device":
            return torch.empty(size, dtype=value.dtype, device=value.device)
        if self.storage == "host" or value.numel() == 0:
            return torch.empty(size, dtype=value.dtype, pin_memory=value.is_cuda)
        return _mapped(size, value.dtype, self._directory)

    def _check(self, values: Mapping[str, Tensor]) -> None:
        if values.keys() != self._rings.keys():
            raise ValueError(
                f"the tensors differ from those in the window: {_difference(values, self._rings)}; "
                "a trajectory follows a fixed set, so clear() it or use another one"
            )
        for name, value in values.items():
            ring = self._rings[name]
            if value.shape != ring.shape or value.dtype != ring.block.rows.dtype:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} {value.dtype}, but its history is "
                    f"{tuple(ring.shape)} {ring.rows.dtype}: clear() the trajectory after changing a tensor"
                )

    def _ring(self, name: str) -> _Ring:
        if name not in self._rings:
            raise ValueError(f"no tensor {name!r} in the window, which holds {self._known()}")
        return self._rings[name]

    def _known(self) -> str:
        return ", ".join(self._rings) if self._rings else "nothing yet (append first)"


def _products(rows: Tensor, num_filled: int, ends: Sequence[int], work: Tensor) -> Tensor:
    """Inner products of the velocities that end in the rows `ends` with those that end in any row.

    `rows` are rings (N, S, P) with `num_filled` rows in use, `work` a buffer (2, S, elements) float64.
    Returns (N, len(ends), S) float64 on the device of `work`, in which only entries that belong to a velocity
    of the window mean anything.
    """
    count, num_rows, num_elements = rows.shape
    products = torch.zeros(count, len(ends), num_rows, dtype=torch.float64, device=work.device)
    longest = max(work.shape[2] // count, 1)
    for first in range(0, count, work.shape[2]):  # (more tensors of one size than the buffer has columns)
        some = rows[first : first + work.shape[2]]
        for start, stop in chunks(num_elements, longest):
            size = (len(some), num_rows, stop - start)
            velocity = _fill_velocities(some[:, :, start:stop], num_filled, work, size)
            products[first : first + len(some)] += _times(velocity, ends)
    return products


def _fill_velocities(source: Tensor, num_filled: int, work: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(N, S, n) float64 in the buffer: row by row what arrived with it, also over the ring's seam."""
    position, velocity = (part.flatten()[: math.prod(size)].view(size) for part in work)
    filled = source[:, :num_filled]
    if _together(work.device):  # bound by memory: one pass less
        velocity[:, :num_filled].copy_(filled)
        velocity[:, 1:num_filled].sub_(filled[:, :-1])
        velocity[:, 0].sub_(filled[:, -1])
        return velocity
    position[:, :num_filled].copy_(filled if source.device.type != "mps" else filled.to(work.device))
    torch.sub(position[:, 1:], position[:, :-1], out=velocity[:, 1:])
    torch.sub(position[:, 0], position[:, -1], out=velocity[:, 0])
    return velocity


def _times(velocity: Tensor, ends: Sequence[int]) -> Tensor:
    """(N, E, S): each of the N tensors' velocities (S, n) times those that end in the rows `ends`."""
    if not _together(velocity.device):  # one call each, so that the bits do not depend on what came with it
        return torch.stack([torch.stack([torch.mv(own, own[end]) for end in ends]) for own in velocity])
    return torch.bmm(velocity[:, list(ends)], velocity.transpose(1, 2))


def _by_block(rings: Sequence[_Ring]) -> list[tuple[_Block, list[_Ring]]]:
    blocks: dict[int, tuple[_Block, list[_Ring]]] = {}
    for ring in rings:
        blocks.setdefault(id(ring.block), (ring.block, []))[1].append(ring)
    return list(blocks.values())


def _together(device: torch.device) -> bool:
    """Whether rows of one size share their memory: on an accelerator, for some launches a size, not a tensor.

    On a CPU there is nothing to gain, and a tensor's bits must not depend on which others are asked for.
    """
    return device.type != "cpu"


def _of_one_size(values: Mapping[str, Tensor]) -> list[list[str]]:
    """The names by number of elements, dtype and device."""
    groups: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
    for name, value in values.items():
        groups.setdefault((value.numel(), value.dtype, value.device), []).append(name)
    return list(groups.values())


def _mapped(size: tuple[int, int], dtype: torch.dtype, directory: Path | None) -> Tensor:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="trajectory-", dir=directory, delete=False) as file:
        path = Path(file.name)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a fatal signal in the mapping
            try:
                os.posix_fallocate(file.fileno(), 0, size[0] * size[1] * dtype.itemsize)
            except OSError:
                path.unlink()
                raise
    rows = torch.from_file(str(path), shared=True, size=size[0] * size[1], dtype=dtype).view(size)
    # The mapping keeps the data; without its name nothing is left behind by a run that is killed. (Windows
    # refuses while the file is mapped, and the file then stays in the folder.)
    with contextlib.suppress(PermissionError):
        path.unlink()
    return rows


def _difference(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    return f"missing {missing[:5] or 'none'}, unexpected {extra[:5] or 'none'}"
