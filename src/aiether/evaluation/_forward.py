"""A causal language model as a function from token ids to logits, whoever wrote it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Forward:
    """The logits of a model, and its cache where it has one.

    `forward` of the model takes `input_ids` (or one positional argument) and returns logits, an object or a
    mapping with `logits`, or a tuple that begins with them. What else it takes is found out from its
    signature; what is not taken is not passed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._names = frozenset(parameters)
        # Wrappers of a transformers model (PEFT's, say) hand on what they do not name.
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._hands_on = takes_any and hasattr(model, "generate")

    def takes(self, name: str) -> bool:
        """Whether the model's forward takes an argument of that name."""
        return name in self._names or self._hands_on

    def __call__(self, ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Logits (B, T, V) without a cache. `inputs` that the model does not take are left out."""
        return self.logits_of(self.call(ids_BT, use_cache=False, **inputs), ids_BT)

    def call(self, ids_BT: Tensor, **inputs: Any) -> Any:
        """What the model returns."""
        taken = {name: value for name, value in inputs.items() if self.takes(name)}
        if "input_ids" in self._names or self._hands_on:
            return self.model(input_ids=ids_BT, **taken)
        return self.model(ids_BT, **taken)

    def cached(self, ids_BT: Tensor, cache: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits (B, T, V) of ids that follow on those in `cache`, and the cache with them (None: none)."""
        output = self.call(ids_BT, past_key_values=cache, use_cache=True, **inputs)
        return self.logits_of(output, ids_BT), _field(output, "past_key_values")

    @staticmethod
    def logits_of(output: Any, ids_BT: Tensor) -> Tensor:
        """The logits in what a model returned. Raises ValueError where there are none of the right shape."""
        logits = output if isinstance(output, Tensor) else _field(output, "logits")
        if logits is None and isinstance(output, (tuple, list)) and output:
            logits = output[0]
        if not isinstance(logits, Tensor) or logits.shape[:-1] != ids_BT.shape:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise ValueError(
                f"forward returned {found} for input_ids of shape {tuple(ids_BT.shape)}; needed are logits "
                "(batch, length, vocabulary), or an object with them as `.logits`"
            )
        return logits


def _field(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's input belongs: the device of its first tensor; the CPU where it has none."""
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
