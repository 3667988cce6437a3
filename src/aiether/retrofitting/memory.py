"""What tuning a retrofitted model needs, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiether.toroidal import ToroidalSettings, attention_modules
from aiether.toroidal.kernels import QUERIES

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
    keeps (16 numbers a token and dimension, in the model's type, and three for each dimension of an MLP that
    is wider than four times the model) and the queries and outputs of all pairs of platters, twice in forward
    and backward. Beside them come the copies in bfloat16 that autocast makes of float32 weights, and scores
    where no kernel takes them, as with attention dropout.
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
    wide = max(0, (getattr(model.config, "intermediate_size", None) or 0) - 4 * width)
    inside = tokens * (16 * width + 3 * wide) * size
    pairs = 4 * settings.platters**2 * tokens * heads * (head_dim + 16) * size
    kept = above * tokens * width * size if config.gradient_checkpointing else above * inside
    torus = pairs if config.gradient_checkpointing else pairs * len(layers)
    # cross-entropy: a float32 copy, its log-softmax, two gradients; divergence: two log-softmaxes, a product
    logits = tokens * vocabulary * 4 * (7 if config.kl_weight else 4)
    # all states of the model as it was and those below the first converted layer, whose own are kept anyway,
    # in the type of the weights; and differences in float32
    states = tokens * width * ((2 * (depth + 1) - above) * first.element_size() + 4 * above)
    states *= config.hidden_weight > 0
    return MemoryEstimate(
        weights=weights,
        training=(terms + beside) * _TRAINED_BYTES + originals,
        activations=kept
        + torus
        + inside
        + states
        + _copies(model, above, config)
        + _scores(model, len(layers), settings, config, context_length),
        logits=logits,
    )


def _copies(model: Any, above: int, config: TuneConfig) -> int:
    """Bytes of autocast's copies of float32 weights: of one layer where its inside is computed anew."""
    first = next(model.parameters())
    if not config.bf16 or first.element_size() != 4:
        return 0
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    layer = (sum(p.numel() for p in model.parameters()) - outside) // model.config.num_hidden_layers
    return 2 * (layer * (1 if config.gradient_checkpointing else above) + head.numel())


def _scores(
    model: Any, layers: int, settings: ToroidalSettings, config: TuneConfig, context_length: int
) -> int:
    """Bytes of scores and what is made of them on the eager path, which computes long rows' blocks anew."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    dropout = any(getattr(model.config, name, 0) for name in names)
    no_kernel = settings.window is not None or settings.distance == "triangle"
    if not dropout and (not no_kernel or next(model.parameters()).device.type == "cuda"):
        return 0
    pairs = config.batch_size * model.config.num_attention_heads * settings.platters**2
    block = pairs * min(context_length, QUERIES) * context_length * 4 * (4 if dropout else 3)
    return block * (1 if config.gradient_checkpointing or context_length > QUERIES else layers)
