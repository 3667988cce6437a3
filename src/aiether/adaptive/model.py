"""LAHR: a Llama with Mixture-of-Depths layers, a latent block that iterates, and a memory; none is a must.

With none of them it is transformers' Llama, tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cache import LatentLayer, latent_layer
from .config import LahrConfig
from .figures import compute_figures, reset_compute_figures
from .latent import KeyValues, LatentReasoning, Store, Thought, keep_stopped, weighted_surrogate
from .masks import attention_mask as mask_for
from .masks import present_tokens
from .memory import ProductKeyMemory
from .mixture_of_depths import commit_routing
from .routed_layer import routed_forward
from .routing import KEPT_IN_FP32, Routing

IGNORED = -100
"""The label that counts for nothing, as everywhere in torch and transformers."""


class LahrRMSNorm(LlamaRMSNorm):
    """Llama's norm; on a GPU one kernel instead of eight where no gradient is needed, as in generating."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LahrDecoderLayer(LlamaDecoderLayer):
    """Llama's layer; a routed one runs on the tokens that its router chooses."""

    def __init__(self, config: LahrConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm = LahrRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LahrRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        routed = config.is_routed(layer_idx)
        self.routing = Routing(config.hidden_size, config.routing_settings(), layer_idx) if routed else None

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.routing is None:
            return super().forward(hidden_states, **kwargs)
        kwargs.pop("position_ids", None)  # which Llama's layer needs no more than its rotary tables
        return routed_forward(
            super().forward,
            self.routing,
            self.self_attn.layer_idx,
            hidden_states,
            implementation=self.config._attn_implementation,
            token_mask=token_mask,
            **kwargs,
        )


class LatentBlock(GradientCheckpointingLayer):
    """The block that is iterated: Llama's layer, whose attention sees stopped tokens as they last were."""

    def __init__(self, config: LahrConfig) -> None:
        super().__init__()
        self.config = config
        self.self_attn = LlamaAttention(config, layer_idx=0)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LahrRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LahrRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, hidden_BTD: Tensor, *, earlier: KeyValues | None, **kwargs: Any
    ) -> tuple[Tensor, KeyValues]:
        """Tensors with gradients side by side: a reentrant checkpoint sees none within tuples or by name."""
        hidden_BTD, keys, values = super().__call__(hidden_BTD, *(earlier or (None, None)), **kwargs)
        return hidden_BTD, (keys, values)

    def forward(
        self,
        hidden_BTD: Tensor,
        earlier_keys: Tensor | None,
        earlier_values: Tensor | None,
        *,
        active_BT: Tensor,
        store: Any = None,
        attention_mask: Tensor | None = None,
        position_embeddings: KeyValues,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next states, and the keys and values."""
        earlier = None
        if earlier_keys is not None and earlier_values is not None:
            earlier = (earlier_keys, earlier_values)
        kept = _Kept(earlier, active_BT, store)
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_BTD),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=kept,
        )
        hidden_BTD = hidden_BTD + attended
        hidden_BTD = hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))
        return hidden_BTD, *kept.own


class _Kept:
    """Stands where attention looks for a cache, to get hold of its keys and values."""

    own: KeyValues

    def __init__(self, earlier: KeyValues | None, active_BT: Tensor, store: Any) -> None:
        self._earlier, self._active_BT, self._store = earlier, active_BT, store

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KeyValues:
        self.own = keep_stopped((keys, values), self._earlier, self._active_BT)
        return self.own if self._store is None else self._store(self.own)


@dataclass
class LahrOutput(BaseModelOutputWithPast):
    """The base model's output.

    Attributes
    ----------
    loss_weights: (B, T), what a token's loss counts in training (p / q of its sampled exit); None: 1.
    iterations: int64 (B, T), how many latent iterations each token took; None without a latent block.
    exits: (N, B, T, D), the states after each iteration, before the final norm; None if not asked for.
    """

    loss_weights: Tensor | None = None
    iterations: Tensor | None = None
    exits: Tensor | None = None


class LahrPreTrainedModel(LlamaPreTrainedModel):
    """What both classes share."""

    config: LahrConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = LahrConfig
    _no_split_modules = ["LahrDecoderLayer", "LatentBlock"]  # noqa: RUF012 - as transformers declares it
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LahrDecoderLayer}  # noqa: RUF012
    _keep_in_fp32_modules_strict = KEPT_IN_FP32

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Routing):
            module.reset_parameters(self.config.initializer_range)
        if isinstance(module, LatentReasoning | ProductKeyMemory):
            module.reset_parameters()

    def reset_compute_figures(self) -> None:
        """Begin to count what tokens cost; counting goes on until `compute_figures`."""
        reset_compute_figures(self)

    def compute_figures(self) -> dict[str, float]:
        """What was counted since `reset_compute_figures`: realised capacity, iterations, memory."""
        return compute_figures(self)


class LahrModel(LahrPreTrainedModel):
    """Embeddings, layers (some routed), memory in their middle, latent block behind them, final norm."""

    def __init__(self, config: LahrConfig) -> None:
        super().__init__(config)
        config.check()
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        learned = config.positions == "learned"
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        )
        self.layers = nn.ModuleList(
            LahrDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        memory, latent = config.memory_settings(), config.latent_settings()
        self.memory = None if memory is None else ProductKeyMemory(config.hidden_size, memory)
        self.latent = (
            None if latent is None else LatentReasoning(LatentBlock(config), config.hidden_size, latent)
        )
        self.norm = LahrRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        all_exits: bool = False,
        **kwargs: Any,
    ) -> LahrOutput:
        """`all_exits`: nobody stops, and the states after each latent iteration are returned."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if self.training and torch.is_grad_enabled():
            commit_routing(self)
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = _positions(attention_mask, hidden_BTD, seen)
        static = past_key_values is not None and past_key_values.is_compileable
        token_mask = _present(attention_mask, hidden_BTD.shape[1], seen if static else None)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.embed_positions is not None:
            _check_length(hidden_BTD.shape[1], seen, self.config.max_position_embeddings)
            hidden_BTD = hidden_BTD + self.embed_positions(position_ids)
        shared: dict[str, Any] = {
            "attention_mask": causal_mask,
            "position_embeddings": self._rotary(hidden_BTD, position_ids),
        }
        memory_before = self.config.memory_before()
        for index, layer in enumerate(self.layers):
            hidden_BTD = self._remembered(hidden_BTD, token_mask, index == memory_before)
            hidden_BTD = layer(
                hidden_BTD,
                token_mask=token_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **shared,
            )
        hidden_BTD = self._remembered(hidden_BTD, token_mask, memory_before == len(self.layers))
        if all_exits:
            shared["all_exits"] = True
        thought = self._thought(hidden_BTD, position_ids, token_mask, past_key_values, shared)
        return LahrOutput(
            last_hidden_state=self.norm(thought.hidden_BTD),  # type: ignore[arg-type]
            past_key_values=past_key_values if use_cache else None,
            loss_weights=thought.weights_BT,
            iterations=None if self.latent is None else thought.iterations_BT,
            exits=thought.exits_NBTD,
        )

    def _rotary(self, hidden_BTD: Tensor, position_ids: Tensor) -> KeyValues:
        """Rotary tables; with learned positions, those of a rotation by nothing."""
        cos, sin = self.rotary_emb(hidden_BTD, position_ids=position_ids)
        return (cos, sin) if self.embed_positions is None else (torch.ones_like(cos), torch.zeros_like(sin))

    def _remembered(self, hidden_BTD: Tensor, token_mask: Tensor | None, here: bool) -> Tensor:
        if self.memory is None or not here:
            return hidden_BTD
        return hidden_BTD + self.memory(hidden_BTD, token_mask)

    def _thought(
        self,
        hidden_BTD: Tensor,
        position_ids: Tensor,
        token_mask: Tensor | None,
        past_key_values: Cache | None,
        shared: dict[str, Any],
    ) -> Thought:
        if self.latent is None:
            return Thought(hidden_BTD, torch.zeros(()), None)
        store: Store | None = None
        if past_key_values is not None:
            latent_cache = latent_layer(past_key_values, len(self.layers), self.latent.settings.iterations)
            _check_filled_alike(latent_cache, past_key_values, hidden_BTD.shape[1])

            def kept(iteration: int, own: KeyValues) -> KeyValues:
                return latent_cache.update(*own, iteration=iteration)

            store = kept

        if shared["attention_mask"] is None and past_key_values is None:
            shared = {
                **shared,
                "attention_mask": mask_for(
                    None, hidden_BTD.shape[1], self.config._attn_implementation, hidden_BTD
                ),
            }
        return self.latent(hidden_BTD, places_BT=position_ids, present_BT=token_mask, store=store, **shared)


def _check_filled_alike(latent_cache: LatentLayer, cache: Cache, num_tokens: int) -> None:
    """Raise ValueError where the layers' caches hold other tokens before the last ones than the block's.

    A static cache is asked before it is first used; later its lengths are on the device.
    """
    if latent_cache.is_compileable and (latent_cache.is_initialized or torch.compiler.is_compiling()):
        return
    seen, own = int(cache.get_seq_length()) - num_tokens, int(latent_cache.get_seq_length())
    if own != seen:
        raise ValueError(
            f"the cache holds {seen} tokens in the layers and {own} in the latent block, as if another model "
            "had filled it: begin with an empty DynamicCache or StaticCache"
        )


def _check_length(num_tokens: int, seen: int | Tensor, most: int) -> None:
    """Raise ValueError where learned positions end; a static cache's length is on the device."""
    length = num_tokens + (seen if isinstance(seen, int) else 0)
    if length > most:
        raise ValueError(
            f"the text has {length} tokens, and the model has learned {most} positions "
            "(max_position_embeddings): shorten it, or train with positions='rope'"
        )


def _positions(attention_mask: Tensor | None, hidden_BTD: Tensor, seen: int) -> Tensor:
    """Each token's place among its row's, int64 (B or 1, T); padding counts for none."""
    num_tokens = hidden_BTD.shape[1]
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(num_tokens, device=hidden_BTD.device)[None] + seen
    return (attention_mask.bool().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]


def _present(attention_mask: Tensor | None, num_tokens: int, seen: int | Tensor | None) -> Tensor | None:
    """Which of the last tokens are no padding; None: all, or not said. `seen` with a static cache."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None if seen is None else present_tokens(attention_mask, num_tokens, seen)
    return attention_mask[:, -num_tokens:].bool()


class LahrForCausalLM(LahrPreTrainedModel, GenerationMixin):
    """A LAHR model with a tied output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LahrConfig) -> None:
        super().__init__(config)
        self.model = LahrModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`labels` are the inputs, shifted here. In training the loss weighs each token's sampled exit."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = causal_lm_loss(logits, labels, output.loss_weights, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def causal_lm_loss(
    logits_BTV: Tensor, labels_BT: Tensor, weights_BT: Tensor | None, num_items: Tensor | int | None
) -> Tensor:
    """Next-token cross-entropy in float32 over `num_items` (None: those labelled), weighted in training."""
    shifted = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    counted = shifted != IGNORED
    num_items = counted.sum().clamp_min(1) if num_items is None else num_items
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), shifted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    if weights_BT is None:
        return losses.sum() / num_items
    return weighted_surrogate(losses, weights_BT.flatten(), counted.flatten().float()) / num_items


AutoConfig.register("lahr", LahrConfig)
AutoModel.register(LahrConfig, LahrModel)
AutoModelForCausalLM.register(LahrConfig, LahrForCausalLM)
