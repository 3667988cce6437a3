"""Training FLOPs of one token, the output head and attention included.

A multiply-add is two FLOPs; the backward pass costs twice the forward one (a product for the inputs and
one for the weights). Counted are matrix products: projections, the head (tied or not), and attention's
two products over the full square of positions. A causal kernel may skip half of that square, and a fused
one computes some of it again in the backward pass: what is counted here is the model, not the kernel
(Chowdhery et al. 2022, appendix B). Norms, activations, rotary embeddings and the softmax are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from aiether.evaluation._forward import Forward, evaluating

_BACKWARD_AND_FORWARD = 3


def flops_per_token(config: PreTrainedConfig, context_length: int, batch_size: int = 1) -> int:
    """Forward and backward FLOPs of one token in a window of `context_length`, in closed form.

    `batch_size`: windows of one forward pass, over which some models spread their work unevenly.

    Raises ValueError for a `model_type` without a closed form.
    """
    forward = _FORWARD.get(config.model_type)
    if forward is None:
        raise ValueError(
            f"no closed form for the FLOPs of model_type {config.model_type!r}; known are "
            f"{', '.join(sorted(_FORWARD))}; measure them with measure_flops_per_token(model, context_length)"
        )
    return int(
        _BACKWARD_AND_FORWARD * forward(config, context_length, batch_size)
    )  # rounded down, as a count is


def _gpt2_forward(config: PreTrainedConfig, context_length: int, _batch_size: int) -> int:
    """Q, K, V and the output projection are 4 d² weights, the MLP 2 d n_inner."""
    d = config.n_embd
    n_inner = 4 * d if config.n_inner is None else config.n_inner
    block = 2 * (4 * d * d + 2 * d * n_inner) + 4 * context_length * d
    return config.n_layer * block + 2 * d * config.vocab_size


def _phi_forward(config: PreTrainedConfig, context_length: int, _batch_size: int) -> int:
    """As GPT-2's, with the MLP beside the attention."""
    d = config.hidden_size
    block = 2 * (4 * d * d + 2 * d * config.intermediate_size) + 4 * context_length * d
    return config.num_hidden_layers * block + 2 * d * config.vocab_size


def _llama_forward(config: PreTrainedConfig, context_length: int, _batch_size: int) -> int:
    """Grouped queries save projections of keys and values, not attention; the MLP has three matrices."""
    d = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    weights = 2 * d * queries + 2 * d * keys + 3 * d * config.intermediate_size
    block = 2 * weights + 4 * context_length * queries
    return config.num_hidden_layers * block + 2 * d * config.vocab_size


def _lahr_forward(config: Any, context_length: int, batch_size: int) -> Fraction:
    """What training executes: routed layers on their slots, a latent iteration on its rows, the memory.

    Routers and halting heads take no matrix product, nor does the memory's table where its slots are read one
    by one; compiled for CUDA a small table is multiplied whole, which is not counted.
    """
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    weights = 2 * (4 * d * heads + 3 * d * config.intermediate_size)
    slots = config.slots(context_length)
    dense = weights + 4 * context_length * heads
    routed = Fraction(slots, context_length) * (weights + 4 * slots * heads)
    num_routed = sum(config.is_routed(layer) for layer in range(config.num_hidden_layers))
    total = (config.num_hidden_layers - num_routed) * dense + num_routed * routed
    if (latent := config.latent_settings()) is not None:
        total += Fraction(sum(latent.training_rows(batch_size)), batch_size) * dense
    if (memory := config.memory_settings()) is not None:
        queries = memory.heads * 2 * memory.key_size
        total += 2 * (d * queries + 2 * d * d + queries * memory.keys)
    return total + 2 * d * config.vocab_size


_FORWARD: dict[str, Callable[[Any, int, int], int | Fraction]] = {
    "gpt2": _gpt2_forward,
    "llama": _llama_forward,
    "phi": _phi_forward,
    "lahr": _lahr_forward,
}


def measure_flops_per_token(model: PreTrainedModel, context_length: int, batch_size: int = 1) -> int:
    """The same number for any causal language model, counted operation by operation.

    A copy without weights (meta device) runs one forward and backward pass over `batch_size` windows with
    eager attention, whose products torch's counter sees; with `sdpa` on a CPU it misses attention altogether.
    The model itself is not touched.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        twin: Any = type(model)(config)
        twin.loss_type = model.loss_type  # where the class's name does not say it, transformers would warn
        ids = torch.zeros(batch_size, context_length, dtype=torch.long)
        mask = torch.ones_like(ids)  # without one, transformers reads the positions' values: none on meta
    counter = FlopCounterMode(display=False)
    with counter:
        twin(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return _total(counter, twin) // ids.numel()


def count_forward_flops(model: nn.Module, input_ids: Tensor) -> int:
    """FLOPs of one forward pass over `input_ids` (B, T), counted as the model itself runs it.

    For models whose work depends on their input. Evaluation mode, no cache; of attention both products over
    the full square count, as above, whichever kernel computes them. Kernels that torch's counter does not
    know (of compiled code, or of other libraries) are not in it.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
    with evaluating(model), counter:
        Forward(model)(input_ids)
    return _total(counter, model)


def _total(counter: FlopCounterMode, model: nn.Module) -> int:
    """What was counted, without the rotary tables, a product in some versions of transformers."""
    rotary = {name for name, _ in model.named_modules() if name.endswith("rotary_emb")}
    counts = counter.get_flop_counts()
    tables = [sum(each.values()) for name, each in counts.items() if name.partition(".")[2] in rotary]
    return counter.get_total_flops() - sum(tables)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products, of queries with keys and of weights with values; arguments are shapes (B, H, T, D)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _grouped_flops(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Every row (N, K) is multiplied by the matrix (K, M) of its group, out of (groups, K, M)."""
    return 2 * left[0] * left[1] * right[-1]


_ALSO_COUNTED: dict[Any, Any] = {  # of the two on CUDA torch's own wants as many heads of values as of keys
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}
