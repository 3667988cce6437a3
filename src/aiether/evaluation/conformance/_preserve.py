"""The model as it was, after all that is done to it here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging as transformers_logging


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Afterwards modes, gradients and buffers are what they were, and so is the random state of torch."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, tensor, value in buffers:
                module._buffers[name] = tensor.copy_(value)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 are not rounded to TF32 or computed in what autocast says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers would advise about random ids, which have no padding and mean nothing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def in_float32(model: nn.Module) -> nn.Module:
    """The model itself where its numbers are float32; else a copy in float32."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return model
    return copy.deepcopy(model).float()
