"""What makes a block the identity: read off the operations that it carries out, not off its names.

A block is run once on the meta device (shapes without data) while every tensor operation is recorded. From
its output one then walks back to its input: additions lead on to the residual stream and to its branches, and
for each branch the nearest tensors are sought that make it zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SAME_VALUES = frozenset(
    ("view", "_unsafe_view", "reshape", "clone", "_to_copy", "detach", "alias", "squeeze", "unsqueeze")
)
"""Operations whose result holds its argument's values in their order."""

_SOME_VALUES = frozenset(
    ("t", "transpose", "permute", "expand", "slice", "select", "index", "gather", "split", "unbind")
)
"""Operations whose result holds some of its argument's values, in another order or repeated."""

_VIEWS = (_SAME_VALUES | _SOME_VALUES) - {"clone", "_to_copy", "index", "gather"}
"""Those of the above whose result lies in its argument's memory."""

_ZERO_AT_ZERO = frozenset(("neg", "sum", "mean", "relu", "gelu", "silu", "tanh", "div"))
"""Operations that are zero where their first argument is."""


class _Node:
    """One recorded tensor: the operation that made it and that operation's arguments, tensors as nodes.

    Views share the memory of a root, which counts what is written into any of them: a node that has seen
    fewer writes describes values that are gone.
    """

    def __init__(self, op: str, args: tuple[Any, ...] = (), *, name: str = "", ndim: int = 0) -> None:
        self.op, self.args, self.name, self.ndim = op, args, name, ndim
        self.root, self.writes, self.seen = self, 0, 0
        if op in _VIEWS and args and isinstance(args[0], _Node) and args[0] is not _OPAQUE:
            self.share(args[0].root)

    def share(self, root: _Node) -> None:
        self.root, self.seen = root, root.writes

    @property
    def is_stale(self) -> bool:
        return self.seen != self.root.writes


_OPAQUE = _Node("opaque")


class OperationRecorder(TorchDispatchMode):
    """Records which operation made which tensor.

    `.item()` on a meta tensor is answered with 1: there are no data to ask, and in a forward pass such
    questions choose the form of an attention mask, not the way of the residual stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nodes: dict[int, _Node] = {}
        self._alive: list[Tensor] = []  # an id belongs to one tensor only while that tensor lives

    def name(self, tensor: Tensor, op: str, name: str = "") -> None:
        """Let `tensor` be a starting point of the record: the block's input or one of its parameters."""
        self._keep(tensor, _Node(op, name=name, ndim=tensor.ndim))

    def node(self, tensor: Tensor) -> _Node:
        node = self._nodes.get(id(tensor), _OPAQUE)
        return _OPAQUE if node.is_stale else node

    def _keep(self, tensor: Tensor, node: _Node) -> None:
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node

    def _recorded(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (list, tuple)):
            return [self._recorded(entry) for entry in value]
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = func.overloadpacket.__name__
        if op == "_local_scalar_dense":
            return 1
        recorded = tuple(self._recorded(value) for value in args)
        written = recorded[0] if func._schema.is_mutable and recorded else None
        if written is not None:
            op = op.removesuffix("_")
        if kwargs and kwargs.get("alpha", 1) != 1:
            op = f"{op} with alpha"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            node = _Node(op, recorded, ndim=result.ndim)
            if isinstance(written, _Node) and written is not _OPAQUE:
                written.root.writes += 1
                if written.root is not written:
                    node.share(written.root)
            self._keep(result, node)
        elif isinstance(result, (list, tuple)):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    whole = op in _SAME_VALUES | _SOME_VALUES or index == 0
                    self._keep(part, _Node(op, recorded, ndim=part.ndim) if whole else _OPAQUE)
        return result


@dataclass(frozen=True)
class _Solution:
    """Values for the block's tensors that bring something about, and how far away those tensors are."""

    values: Mapping[str, float] = field(default_factory=dict)
    distance: int = 0

    def __or__(self, other: _Solution) -> _Solution:
        return _Solution({**self.values, **other.values}, max(self.distance, other.distance))


class _Solver:
    """Finds the nearest tensors that give a recorded tensor one value everywhere.

    With `matrices`, tensors of one dimension (scales of norms, biases) are passed over: the solution is then
    the projection that writes into the residual stream.
    """

    def __init__(self, *, matrices: bool) -> None:
        self.matrices = matrices
        self._known: dict[tuple[int, float], _Solution | None] = {}

    def fill(self, node: Any, value: float) -> _Solution | None:
        if not isinstance(node, _Node):
            return None
        key = (id(node), value)
        if key not in self._known:
            self._known[key] = None
            found = self._fill(node, value)
            self._known[key] = found and _Solution(found.values, found.distance + 1)
        return self._known[key]

    def _fill(self, node: _Node, value: float) -> _Solution | None:
        if node.op == "parameter":
            return None if self.matrices and node.ndim < 2 else _Solution({node.name: value})
        if node.op in _SAME_VALUES | _SOME_VALUES:
            return self.fill(node.args[0], value)
        if node.op in ("add", "sub") and isinstance(node.args[1], (int, float)):
            offset = node.args[1] if node.op == "add" else -node.args[1]
            return self.fill(node.args[0], value - offset)
        if value:
            return None
        return self._vanish(node)

    def _vanish(self, node: _Node) -> _Solution | None:
        args = node.args
        if node.op in ("add", "sub"):
            return self._all(args[:2])
        if node.op in ("mul", "mm", "bmm"):
            return self._nearest(args[:2])
        if node.op in ("addmm", "baddbmm"):
            product = self._nearest(args[1:3])
            return product if self.matrices else self._both(self.fill(args[0], 0.0), product)
        if node.op == "convolution":
            product, bias = self._nearest(args[:2]), args[2]
            return product if self.matrices or bias is None else self._both(self.fill(bias, 0.0), product)
        if node.op == "cat":
            return self._all(args[0])
        if node.op in ("native_layer_norm", "_fused_rms_norm"):
            affine = [arg for arg in args[2:4] if isinstance(arg, _Node)]
            return self._all(affine) if affine and not self.matrices else self.fill(args[0], 0.0)
        return self.fill(args[0], 0.0) if node.op in _ZERO_AT_ZERO else None

    def _nearest(self, nodes: Iterable[Any]) -> _Solution | None:
        found = [solution for node in nodes if (solution := self.fill(node, 0.0)) is not None]
        return min(found, key=lambda solution: solution.distance, default=None)

    def _all(self, nodes: Iterable[Any]) -> _Solution | None:
        whole: _Solution | None = _Solution()
        for node in nodes:
            whole = self._both(whole, self.fill(node, 0.0))
        return whole

    @staticmethod
    def _both(first: _Solution | None, second: _Solution | None) -> _Solution | None:
        return None if first is None or second is None else first | second

    def identity(self, node: Any) -> _Solution | str:
        """Values that make `node` the block's input; else what stands in the way."""
        if not isinstance(node, _Node) or node.op in ("opaque", "parameter"):
            return "there is no residual stream"
        if node.op == "input":
            return _Solution()
        if node.op in _SAME_VALUES:
            return self.identity(node.args[0])
        if node.op == "add":
            return self._beside(node.args[:2], lambda branch: self.fill(branch, 0.0))
        if node.op == "mul":  # a scale on the whole stream, such as Gemma 4's layer_scalar
            return self._beside(node.args[:2], lambda scale: _Solver(matrices=False).fill(scale, 1.0))
        return f"{node.op} stands on the residual stream"

    def _beside(self, pair: tuple[Any, ...], solve: Callable[[Any], _Solution | None]) -> _Solution | str:
        """The stream runs through one of two arguments; the other one must be silenced."""
        first, second = (self.identity(node) for node in pair)
        for stream, other in ((first, pair[1]), (second, pair[0])):
            if isinstance(stream, _Solution):
                silenced = solve(other)
                return "no tensor silences one of its branches" if silenced is None else stream | silenced
        return next(reason for reason in (first, second) if isinstance(reason, str))


@dataclass(frozen=True)
class BlockIdentity:
    """What one block's operations tell.

    Attributes
    ----------
    values: tensors (suffixes) and the value that each must be filled with for the block to be the identity.
    projections: the matrices that write into the residual stream, through norms and scales if need be.
    unit_offset: tensors that are used as 1 + w, so that zero is their neutral value.
    obstacle: what keeps the block from being the identity, in words; None when nothing does.
    """

    values: Mapping[str, float]
    projections: tuple[str, ...]
    unit_offset: tuple[str, ...]
    obstacle: str | None = None


def read_identity(recorder: OperationRecorder, output: Tensor) -> BlockIdentity:
    """What the record of a block's forward pass says about its output.

    Parameters
    ----------
    recorder: has seen the pass, with the block's input and parameters named to it.
    output: the hidden states that the block returned.
    """
    node = recorder.node(output)
    nearest, matrices = (_Solver(matrices=choice).identity(node) for choice in (False, True))
    written = {} if isinstance(matrices, str) else matrices.values
    return BlockIdentity(
        values={} if isinstance(nearest, str) else nearest.values,
        projections=tuple(name for name, value in written.items() if value == 0),
        unit_offset=tuple(sorted(_unit_offsets(node))),
        obstacle=nearest if isinstance(nearest, str) else None,
    )


def _unit_offsets(output: _Node) -> set[str]:
    found: set[str] = set()
    seen: set[int] = set()
    todo: list[Any] = [output]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        if not isinstance(node, _Node) or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op == "add" and node.args[1] == 1 and (name := _parameter_name(node.args[0])):
            found.add(name)
        todo += node.args
    return found


def _parameter_name(node: Any) -> str:
    while isinstance(node, _Node) and node.op in _SAME_VALUES:
        node = node.args[0]
    return node.name if isinstance(node, _Node) else ""
