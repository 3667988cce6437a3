"""The model as it was before: the teacher, without a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aiether.toroidal import torus_terms

from .adapters import adapter_layers


@contextmanager
def as_before(model: Any, originals: Mapping[str, Tensor]) -> Iterator[None]:
    """Plain attention, no adapters, and the original values of weights that are trained, until the end.

    The model is in evaluation mode meanwhile: a teacher has no dropout.

    Args:
        originals: by name; tensors that are trained in place.
    """
    terms, adapters = list(torus_terms(model)), [layer for _, layer in adapter_layers(model)]
    active, training = [each.active for each in terms], model.training
    tuned = {name: parameter for name, parameter in model.named_parameters() if name in originals}
    moved = {name: parameter.data for name, parameter in tuned.items()}
    try:
        for each in terms:
            each.active = False
        for layer in adapters:
            layer.enable_adapters(False)
        for name, parameter in tuned.items():
            parameter.data = originals[name]
        model.eval()
        torch.clear_autocast_cache()  # which holds other values of the same weights
        yield
    finally:
        for each, was in zip(terms, active, strict=True):
            each.active = was
        for layer in adapters:
            layer.enable_adapters(True)
        for name, parameter in tuned.items():
            parameter.data = moved[name]
        torch.clear_autocast_cache()
        model.train(training)
