"""Every parameter learns: the loss of random batches reaches it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiether.evaluation.conformance._report import Check
from aiether.evaluation.conformance._trial import Trial

ROWS, BATCHES = 4, 3
NUDGE = 0.02
"""Standard deviation of what is added to the weights where a gradient is zero at the weights as they are."""


def gradient(trial: Trial) -> Check:
    """After backward of several batches every trainable tensor has a gradient, finite and not zero.

    A tensor behind a factor of zero (a gate at its start, LoRA's second matrix) has gradient zero there and
    no other fault: where one is zero, it is looked for again with a little noise on all weights. Tensors of
    modules that say they take no part yet (`active` is False, as of a torus at progress 0) are left out.
    """
    name, model = "gradient", trial.model
    idle = {
        id(tensor)
        for module in model.modules()
        if getattr(module, "active", True) is False
        for tensor in module.parameters()
    }
    trained = {
        key: tensor
        for key, tensor in model.named_parameters()
        if tensor.requires_grad and id(tensor) not in idle
    }
    if not trained:
        return Check.not_applicable(name, "no parameter requires a gradient")
    _backward(trial)
    faults = _faults(trained)
    zero = [key for key, fault in faults.items() if fault == "zero"]
    asleep: list[str] = []
    if zero:
        _nudged_backward(trial)
        still = _faults(trained)
        asleep = [key for key in zero if key not in still]
        faults = {key: fault for key, fault in faults.items() if key not in asleep}
    frozen = sum(not tensor.requires_grad for tensor in model.parameters())
    told = [f"{key} ({fault})" for key, fault in faults.items()]
    details = [
        ", ".join(told),
        f"zero at these weights and not beside them: {', '.join(asleep)}" if asleep else "",
        f"frozen and not looked at: {frozen} of {frozen + len(trained)} tensors" if frozen else "",
        f"take no part yet and not looked at: {len(idle)} tensors" if idle else "",
    ]
    where = f"{len(faults)} of {len(trained)} tensors" if faults else ""
    detail = "; ".join(filter(None, details))
    return Check(name, not faults, float(len(faults)), 0.0, where, detail)


def _backward(trial: Trial) -> None:
    """Gradients in training mode, of several batches summed."""
    trial.model.zero_grad(set_to_none=True)
    trial.model.train()
    with torch.enable_grad():
        for number in range(BATCHES):
            _loss(trial, trial.ids(ROWS, number)).backward()


def _loss(trial: Trial, ids_BT: Tensor) -> Tensor:
    """The model's own loss, which may have parts beside the next token's; else the next token's."""
    forward = trial.forward
    labels: dict[str, Any] = {"labels": ids_BT} if forward.takes("labels") else {}
    output = forward.call(ids_BT, use_cache=False, **labels)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    logits = forward.logits_of(output, ids_BT)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def _nudged_backward(trial: Trial) -> None:
    """The same with noise on all weights, which are put back."""
    generator = torch.Generator().manual_seed(trial.seed)
    kept = [(tensor, tensor.detach().clone()) for tensor in trial.model.parameters()]
    try:
        with torch.no_grad():
            for tensor, _ in kept:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.add_(noise.to(tensor), alpha=NUDGE)
        _backward(trial)
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def _faults(trained: dict[str, nn.Parameter]) -> dict[str, str]:
    found = {key: _fault(tensor.grad) for key, tensor in trained.items()}
    return {key: fault for key, fault in found.items() if fault is not None}


def _fault(gradient: Tensor | None) -> str | None:
    if gradient is None:
        return "none"
    if not gradient.isfinite().all():
        return "not finite"
    return None if gradient.count_nonzero() else "zero"
