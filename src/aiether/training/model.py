"""The default model: transformers' own GPT-2, Llama or Phi, or a LAHR model, built from a configuration."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Literal

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from aiether.adaptive import LahrConfig, LahrForCausalLM, LahrSettings, lahr_parts
from aiether.growth import family_of, initialise_output_projections

Architecture = Literal["gpt2", "llama", "phi", "lahr"]


def model_config(
    arch: Architecture,
    *,
    n_layer: int,
    n_head: int,
    n_embd: int,
    context_length: int,
    vocab_size: int,
    dropout: float,
    eos_token_id: int | None,
    lahr: LahrSettings | None = None,
) -> PreTrainedConfig:
    """transformers' configuration of a model, without the cache; `lahr` for that architecture alone."""
    if n_embd % n_head:
        raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}; change one of them")
    tokens = {"vocab_size": vocab_size, "bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    if arch == "gpt2":
        return GPT2Config(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            n_positions=context_length,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            use_cache=False,
            **tokens,
        )
    shape: dict[str, Any] = {
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "hidden_size": n_embd,
        "max_position_embeddings": context_length,
        "attention_dropout": dropout,
        "tie_word_embeddings": True,
        "use_cache": False,
        **tokens,
    }
    if arch == "phi":
        shape |= {"intermediate_size": 4 * n_embd, "resid_pdrop": dropout, "embd_pdrop": dropout}
        shape["partial_rotary_factor"] = 0.5
        return PhiConfig(**shape)
    parts = {} if lahr is None else lahr_parts(lahr, n_layer)
    return (LlamaConfig if lahr is None else LahrConfig)(
        **shape, intermediate_size=llama_width(n_embd), **parts
    )


def build_model(arch: Architecture, *, final_depth: int, seed: int, **settings: Any) -> PreTrainedModel:
    """A fresh model in float32, with a tied output head and the cache off; `settings` as in `model_config`.

    Every arm, grown or static, uses one initialisation rule: output projections are drawn at
    initializer_range / sqrt(2 * final_depth), for the planned final depth (DESIGN.md, "Decisions taken").
    Every matrix is drawn from a generator of its own, seeded by (`seed`, its name): two models of one seed
    and one width begin with the same numbers in each tensor that both have, whatever else they hold.
    """
    with torch.random.fork_rng():  # construction draws numbers that are drawn again below
        model = undrawn_model(arch, **settings)
    _draw_by_name(model, seed)
    initialise_output_projections(model, family_of(model), final_depth, partial(named_generator, seed))
    return model


def undrawn_model(arch: Architecture, **settings: Any) -> PreTrainedModel:
    """The same model as transformers makes it; under `torch.device("meta")` its shapes alone."""
    config: Any = model_config(arch, **settings)
    model: PreTrainedModel = _CLASSES[arch](config)
    model.loss_type = "ForCausalLM"  # GPT-2's class name does not say it, and transformers would warn
    return model


_CLASSES: dict[Architecture, Any] = {
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "phi": PhiForCausalLM,
    "lahr": LahrForCausalLM,
}


def _draw_by_name(model: PreTrainedModel, seed: int) -> None:
    """Every matrix anew, and routers; other vectors are constants at the start (norms 1, biases 0)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith("routing.weight"):
                parameter.normal_(0.0, model.config.initializer_range, generator=named_generator(seed, name))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator for what belongs to `name` alone: nothing else that is drawn moves it."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def llama_width(n_embd: int) -> int:
    """8/3 of the width, rounded up to a multiple of 32: a gated MLP of GPT-2's parameter count."""
    return -(-8 * n_embd // 3 // 32) * 32
