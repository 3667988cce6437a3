"""Low-rank adapters (LoRA) on the attention of chosen layers, by peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from aiether.toroidal import attention_modules

_ADVICE = "LoRA needs peft: install aiether[lora], or choose tune='terms' or 'full'"


def add_adapters(model: nn.Module, layers: Sequence[int], *, rank: int, alpha: float) -> None:
    """LoRA on every projection of these layers' attention, in place; at its beginning it changes nothing.

    Hu et al. 2021 (arXiv:2106.09685). Its weights are float32, whatever the model's are.

    Raises
    ------
    ValueError
        If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(_ADVICE) from error
    names = {module: name for name, module in model.named_modules()}
    targets = [
        f"{names[attention]}.{name}"
        for attention in attention_modules(model, layers)
        for name, child in attention.named_modules()
        if isinstance(child, nn.Linear | Conv1D)
    ]
    conv = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=conv)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with an adapter, by name; none where peft is not there."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def remove_adapters(model: nn.Module, *, merge: bool) -> None:
    """Take the adapters out, in place; with `merge` what they learned is added to the weights first."""
    for name, layer in adapter_layers(model):
        if merge:
            layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
