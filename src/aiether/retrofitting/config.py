"""How a retrofitted model is tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Tune = Literal["lora", "full", "terms"]


@dataclass(frozen=True)
class TuneConfig:
    """The way to the torus: attention transfer, then cross-entropy and divergence from the model as it was.

    Attributes
    ----------
    transfer_steps: optimizer steps of layer-wise transfer, before
    steps: those of the whole model.
    ramp: over which share of all of them progress rises from 0 to 1, linearly.
    batch_size, accumulation: windows of a forward pass, and passes of a step.
    tune: what learns beside the terms: `lora` adapters on the attention of the converted layers, `full`, all
        weights of these layers' attention, or nothing (`terms`).
    lr, terms_lr: of adapters or weights, and of the terms; both rise for `warmup` of the steps and fall to 0
        as a cosine.
    kl_weight: share of the divergence in the loss of the whole model; cross-entropy has the rest.
    hidden_weight: of how far hidden states are from those of the model as it was, beside both (MOHAWK,
        arXiv:2408.10189, aligns them before it distils).
    save_interval: steps between two states to go on from.
    """

    transfer_steps: int = 40
    steps: int = 80
    ramp: float = 0.5
    batch_size: int = 1
    accumulation: int = 16
    tune: Tune = "lora"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lr: float = 5e-4
    terms_lr: float = 1e-2
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    kl_weight: float = 0.5
    hidden_weight: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    save_interval: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tune not in get_args(Tune):
            raise ValueError(f"tune is {self.tune!r}: choose one of {', '.join(get_args(Tune))}")
        for name, least in (
            ("transfer_steps", 0), ("steps", 0), ("batch_size", 1), ("accumulation", 1), ("lora_rank", 1),
            ("save_interval", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.all_steps == 0:
            raise ValueError("steps and transfer_steps are both 0: nothing would learn; give one of them")
        for name in ("ramp", "warmup", "kl_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share from 0 to 1 is meant")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must be 0 to {2**32 - 1}")
        for name in ("weight_decay", "hidden_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        for name in ("lr", "terms_lr", "max_grad_norm", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be greater than 0")

    @property
    def all_steps(self) -> int:
        return self.transfer_steps + self.steps

    def progress_at(self, step: int) -> float:
        """Progress during step `step`, from 0: never 0, and 1 from the end of the ramp."""
        rising = math.ceil(self.ramp * self.all_steps)
        return 1.0 if rising == 0 else min(1.0, (step + 1) / rising)

    def rate_at(self, step: int) -> float:
        """The factor on the learning rates; each of the two stages has a rise and a fall of its own."""
        first = step < self.transfer_steps
        total = self.transfer_steps if first else self.steps
        at = step if first else step - self.transfer_steps
        rising = math.ceil(self.warmup * total)
        if at < rising:
            return (at + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (at - rising) / max(1, total - rising)))
