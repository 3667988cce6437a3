"""What tuning a retrofitted model needs, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiether.toroidal import ToroidalSettings, attention_modules

from .config import TuneConfig

_GIB = 2**30
_TRAINED_BYTES = 4 + 4 + 8
"""Of a trained number: its float32 master, its gradient, Adam's two moments."""
_WORKSPACE_BYTES = 2 * 32 * 2**20
"""Of the matrix library, one each for the forward and the backward thread, as on a Hopper GPU."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for.

    Attributes
    ----------
    weights: the frozen model, as it is stored.
    training: float32 masters, gradients and moments of what is trained; originals of weights that are tuned.
    activations: what one forward pass leaves for its gradient, at its peak.
    logits: of the model now and before, in float32, with what the losses make of them and their gradient.
    workspace: of the matrix library, on a GPU.
    """

    weights: int
    training: int
    activations: int
    logits: int
    workspace: int = _WORKSPACE_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.logits + self.workspace

    def __str__(self) -> str:
        parts = ("weights", "training", "activations", "logits", "workspace")
        told = ", ".join(f"{name} {getattr(self, name) / _GIB:.2f}" for name in parts)
        return f"{self.total / _GIB:.2f} GiB ({told})"


def estimate_memory(
    model: Any,
    layers: Sequence[int],
    settings: ToroidalSettings,
    config: TuneConfig,
    context_length: int,
) -> MemoryEstimate:
    """For a model before its conversion; a model on the meta device will do.

    With gradient checkpointing a layer keeps its input, and one layer's inside is alive at a time; of layers
    below the first converted one nothing is kept. The inside is counted as the dense parts that transformers
    keeps (16 numbers a token and dimension, in the model's type) and the queries and outputs of all pairs of
    platters, twice in forward and backward.
    """
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    depth, vocabulary = model.config.num_hidden_layers, model.config.vocab_size
    first = next(model.parameters())
    size = 2 if config.bf16 else first.element_size()
    tokens = config.batch_size * context_length
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    attentions = attention_modules(model, layers)
    head_dim = getattr(attentions[0], "head_dim", None) or width // heads
    terms = len(layers) * heads * (1 + head_dim * settings.token_lambda + 1)
    beside = 0
    matrices = [
        m.weight.shape for a in attentions for m in a.modules() if getattr(m, "weight", None) is not None
    ]
    matrices = [shape for shape in matrices if len(shape) == 2]
    originals = 0
    if config.tune == "lora":
        beside = sum(config.lora_rank * (rows + columns) for rows, columns in matrices)
    elif config.tune == "full":
        beside = sum(p.numel() for a in attentions for p in a.parameters())
        originals = beside * first.element_size()
    above = depth - min(layers)
    inside = 16 * tokens * width * size
    pairs = 4 * settings.platters**2 * tokens * heads * (head_dim + 16) * size
    kept = above * tokens * width * size if config.gradient_checkpointing else above * inside
    torus = pairs if config.gradient_checkpointing else pairs * len(layers)
    # cross-entropy: a float32 copy, its log-softmax, two gradients; divergence: two log-softmaxes, a product
    logits = tokens * vocabulary * 4 * (7 if config.kl_weight else 4)
    return MemoryEstimate(
        weights=weights,
        training=(terms + beside) * _TRAINED_BYTES + originals,
        activations=kept + torus + inside,
        logits=logits,
    )
