"""What a user switched on in a model that its configuration does not hold: carried to every model of the run.

Gradient checkpointing, dropout probabilities, and a loss function of the user's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from aiether.growth import Family

from ._described import fresh_model

_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func", "_loss_function")
_PERIODIC = ("gradient_checkpointing", "_gradient_checkpointing_func")  # every n-th layer may have it

Place = tuple[str, str]
"""(path of the module, attribute)"""


@dataclass(frozen=True)
class Switched:
    """Where a model differs from a fresh one of its configuration.

    Attributes
    ----------
    outside: by place in the model, the value there.
    inside: by place in a block, the values that the blocks have in turn.
    inputs_require_grads: whether `enable_input_require_grads` was called.
    """

    outside: dict[Place, Any]
    inside: dict[Place, tuple[Any, ...]]
    inputs_require_grads: bool

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family) -> Switched:
        """Read off a model that its configuration describes.

        Raises
        ------
        ValueError
            If blocks were given different dropout: nothing says which a new layer gets.
        """
        fresh = dict(fresh_model(model).named_modules())
        outside: dict[Place, Any] = {}
        changed: set[Place] = set()
        by_layer: dict[Place, dict[int, Any]] = {}
        for path, module in model.named_modules():
            for name, value in _switches(module):
                block = _place_in_block(path, family)
                built = getattr(fresh.get(path), name, None)
                if block is None:
                    if value != built:
                        outside[path, name] = value
                    continue
                place = (block[1], name)
                by_layer.setdefault(place, {})[block[0]] = value
                if value != built:
                    changed.add(place)
        inside = {place: _in_turn(place, by_layer[place]) for place in sorted(changed)}
        return cls(outside, inside, bool(getattr(model, "_require_grads_hooks", None)))

    def apply(self, model: PreTrainedModel, family: Family) -> None:
        """Switch it on in a model of any depth; a second time changes nothing."""
        for path, module in model.named_modules():
            block = _place_in_block(path, family)
            if block is None:
                for (where, name), value in self.outside.items():
                    if where == path:
                        setattr(module, name, value)
                continue
            layer, inner = block
            for (where, name), values in self.inside.items():
                if where == inner:
                    setattr(module, name, values[layer % len(values)])
        if self.inputs_require_grads and not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()


def _switches(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        dropout = type(value) in (int, float) and ("drop" in name or (name == "p" and _drops(module)))
        if dropout or name in _SWITCHES:
            yield name, value


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd)


def _place_in_block(path: str, family: Family) -> tuple[int, str] | None:
    """(layer, path of the module inside its block); None outside of the blocks."""
    parts = family.split(f"{path}.*")
    return (parts[0], parts[1].removesuffix("*").removesuffix(".")) if parts else None


def _in_turn(place: Place, by_layer: dict[int, Any]) -> tuple[Any, ...]:
    """The shortest sequence that, repeated, gives every layer its value."""
    values = [by_layer.get(layer) for layer in range(max(by_layer) + 1)]
    period = next(
        length
        for length in range(1, len(values) + 1)
        if all(value == values[layer % length] for layer, value in enumerate(values))
    )
    path, name = place
    if period > 1 and name not in _PERIODIC:
        raise ValueError(
            f"the layers have different {name} in {path or 'the block'!r} ({values}), which their "
            "configuration does not say: nothing tells which a new layer gets. Give all "
            "layers the same, or set it in the configuration"
        )
    return tuple(values[:period])
