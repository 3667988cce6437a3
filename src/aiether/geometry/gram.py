"""Inner products of the velocities of a tensor, streamed in chunks that fit in cache.

Every quantity of the geometry is a function of G = V Vᵀ, where row t of V is W_t - W_{t-1}
(docs/mathematics.md). Differences and sums are taken in float64, because an eigenvalue of G is the
square of a singular value of V: in float32 every mode below 3e-4 of the largest would be noise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

TensorLike: TypeAlias = Tensor | np.ndarray

# Elements of one float64 work buffer. On a CPU two of them (4 MB) stay in the last-level cache; on an
# accelerator they have to be large enough to hide the cost of starting a kernel.
_CPU_ELEMENTS = 1 << 18
_ACCELERATOR_ELEMENTS = 1 << 23
_ALIGNMENT = 64
# Elements of a row that one thread works through at a time, and how many threads may hold work buffers at
# once.
_PIECE_ELEMENTS = 1 << 19
_MAX_WORKERS = 4

# The sum over positions spares the differences, at the price of cancellation: an error of S u Σ|a_j| of the
# weights (u = 2^-53). Up to this Σ|a_j| that is a thousandth of what rounding to single precision costs
# anyway.
_MAX_POSITION_WEIGHT = 2.0**16

T = TypeVar("T")


def as_tensor(value: TensorLike) -> Tensor:
    """The value as a detached floating-point tensor that shares its memory where it can.

    Raises `ValueError` for integer, boolean, complex and extended-precision values.
    """
    tensor = _from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
    if not tensor.is_floating_point():
        raise ValueError(
            f"a snapshot has dtype {tensor.dtype}, but geometry needs floating-point values: "
            "leave integer and boolean tensors out, or convert them first"
        )
    return tensor


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise ValueError(
            f"a snapshot has dtype {array.dtype}, but the widest supported is float64: convert it"
        )
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)
    with warnings.catch_warnings():
        # A read-only array (np.load with mmap_mode="r") is fine here: nothing below writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(native)


def as_rows(snapshots: Sequence[TensorLike]) -> list[Tensor]:
    """The snapshots as flat tensors of one length; contiguous ones are not copied."""
    tensors = [as_tensor(snapshot) for snapshot in snapshots]
    for index, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"snapshot {index} has shape {tuple(tensor.shape)}, the first {tuple(tensors[0].shape)}: "
                "a trajectory is the history of one tensor, whose shape stays the same"
            )
    return [tensor.reshape(-1) for tensor in tensors]


def compute_device(tensor: Tensor) -> torch.device:
    """Where float64 work on this tensor happens: beside it, or on the CPU where it has no float64 (MPS)."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Work through chunks on one processor core.

    The work is bound by memory and made of thousands of short calls: more threads gain little on an idle
    machine, lose several times over at their barriers on a busy one, and would make the bits depend on their
    number.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chunk_length(num_rows: int, device: torch.device) -> int:
    """How many columns of `num_rows` rows are worked through at a time."""
    budget = _CPU_ELEMENTS if device.type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(budget // num_rows // _ALIGNMENT, 1) * _ALIGNMENT


def chunks(num_elements: int, length: int) -> Iterator[tuple[int, int]]:
    """Bounds of the column ranges of at most `length` columns."""
    for start in range(0, num_elements, length):
        yield start, min(start + length, num_elements)


def position_chunks(rows: Sequence[Tensor], device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, positions (S, n)) in float64; the buffer is reused."""
    num_elements = rows[0].numel()
    length = max(min(chunk_length(len(rows), device), num_elements), 1)
    positions = torch.empty(len(rows), length, dtype=torch.float64, device=device)
    for start, stop in chunks(num_elements, length):
        position = positions[:, : stop - start]
        for target, row in zip(position, rows, strict=True):
            source = row[start:stop]
            target.copy_(source if source.device.type != "mps" else source.to(device))
        yield start, stop, position


def velocity_gram(snapshots: Sequence[TensorLike]) -> Tensor:
    """The Gram matrix of the velocities, G[s, t] = <W_{s+1} - W_s, W_{t+1} - W_t>.

    Args:
        snapshots: S >= 2 tensors or arrays of one shape, oldest first; any floating dtype, any device.

    Returns:
        (S-1, S-1) float64 on the CPU, symmetric. Work memory is a constant of a few MB.

    Raises:
        ValueError: fewer than two snapshots, unequal shapes or a dtype that is not floating-point.
    """
    if len(snapshots) < 2:
        raise ValueError(
            f"{len(snapshots)} snapshot(s) given, but a velocity needs at least 2: collect more first"
        )
    rows = as_rows(snapshots)
    device = compute_device(rows[-1])
    count = len(rows) - 1

    def piece(start: int, stop: int) -> Tensor:
        part = torch.zeros(count, count, dtype=torch.float64, device=device)
        velocity = None
        for _, _, position in position_chunks([row[start:stop] for row in rows], device):
            velocity = (
                torch.empty_like(position[1:]) if velocity is None else velocity[:, : position.shape[1]]
            )
            torch.sub(position[1:], position[:-1], out=velocity)
            part.addmm_(velocity, velocity.T)
        return part

    gram = torch.stack(_by_pieces(piece, rows[-1])).sum(dim=0).cpu()
    return (gram + gram.T) / 2


def add_velocities(snapshots: Sequence[TensorLike], coefficients: Tensor) -> Tensor:
    """W_{S-1} + sum_t c_t V_t, in the shape, dtype and device of the last snapshot.

    `coefficients` is (S-1,) float64. The sum is taken in float64 and rounded once.
    """
    rows = as_rows(snapshots)
    last = as_tensor(snapshots[-1])
    result = torch.empty_like(last, memory_format=torch.contiguous_format)
    flat = result.view(-1)
    device = compute_device(last)
    steps = coefficients.to(device=device, dtype=torch.float64)
    weights = _position_weights(steps)
    by_position = last.dtype != torch.float64 and float(weights.abs().sum()) <= _MAX_POSITION_WEIGHT

    def piece(first: int, stop: int) -> None:
        target = flat[first:stop]
        for begin, end, position in position_chunks([row[first:stop] for row in rows], device):
            if by_position:
                values = position.T @ weights
            else:
                values = torch.addmv(position[-1], position.diff(dim=0).T, steps)
            target[begin:end].copy_(_narrowed(values, flat))

    _by_pieces(piece, rows[-1])
    return result


def _position_weights(steps: Tensor) -> Tensor:
    """a with sum_j a_j W_j = W_{S-1} + sum_t c_t V_t."""
    weights = torch.zeros(len(steps) + 1, dtype=steps.dtype, device=steps.device)
    weights[1:] += steps
    weights[:-1] -= steps
    weights[-1] += 1
    return weights


def _by_pieces(work: Callable[[int, int], T], like: Tensor) -> list[T]:
    """The results of work(start, stop) over pieces of a row, in order.

    On a CPU the pieces are shared out to as many Python threads as torch has, each on one core: PyTorch
    releases the interpreter lock, and threads that meet once a tensor do not wait for each other at every
    chunk. What the pieces are depends on the tensor alone, so the bits do not depend on the number of
    threads.
    """
    length = _PIECE_ELEMENTS if like.device.type == "cpu" else max(like.numel(), 1)
    bounds = list(chunks(like.numel(), length)) or [(0, 0)]
    num_workers = min(len(bounds), torch.get_num_threads(), _MAX_WORKERS)
    with one_thread(compute_device(like)):
        if num_workers == 1:
            return [work(start, stop) for start, stop in bounds]
        with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda bound: work(*bound), bounds))


def _narrowed(values: Tensor, like: Tensor) -> Tensor:
    # A device without float64 can only receive values that are already in its own dtype.
    return values.to(like.dtype) if like.device.type == "mps" else values
