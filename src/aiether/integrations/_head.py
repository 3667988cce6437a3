"""The loss of a causal language model with the output head in the same compiled graph.

transformers computes the logits, hands them back in float32 and takes their cross-entropy eagerly: with a
small model in front, several passes over a (tokens x vocabulary) matrix cost as much as the blocks. Compiled
together, the cross-entropy is one pass over the logits, and they are never returned.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from aiether.adaptive.model import IGNORED, causal_lm_loss


def head_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    num_items: Tensor | int | None,
    weights_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the next token, summed over `num_items`; None: the mean over labelled tokens.

    The labels are the inputs (the shift happens here); the loss is computed in float32. `weights_BT` are
    those of sampled exits (`aiether.adaptive.latent`).
    """
    logits_BTV = F.linear(hidden_BTD, weight_VD, bias_V)
    if weights_BT is not None:
        return causal_lm_loss(logits_BTV, labels_BT, weights_BT, num_items)
    shifted = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()  # no gradient for the last position
    logits = logits_BTV.flatten(0, 1).float()
    if num_items is None:
        return F.cross_entropy(logits, shifted, ignore_index=IGNORED)
    return F.cross_entropy(logits, shifted, ignore_index=IGNORED, reduction="sum") / num_items


@cache
def compiled_head_loss() -> Any:
    """`head_loss` compiled, once a process: batches and depths share its graphs."""
    return torch.compile(head_loss)


def causal_loss(
    model: PreTrainedModel, input_ids_BT: Tensor, labels_BT: Tensor, num_items: Tensor | int | None
) -> Tensor:
    """The loss of a model whose logits are one linear map of its last hidden state."""
    output = model.base_model(input_ids=input_ids_BT)
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    weights = getattr(output, "loss_weights", None)
    hidden_BTD, compiled = output.last_hidden_state, compiled_head_loss()
    return compiled(hidden_BTD, head.weight, labels_BT, num_items, weights, head.bias)
