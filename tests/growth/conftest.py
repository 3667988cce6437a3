"""Tiny real models, their training states and their histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aiether.geometry import Trajectory
from aiether.growth import TrainingState, block_tensors, family_of

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 16,
        "n_head": 2,
        "n_positions": 16,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
}
SHAPES["mistral"] = SHAPES["qwen2"] = SHAPES["llama"]
SHAPES["qwen3"] = {**SHAPES["llama"], "head_dim": 8}

Build = Callable[..., PreTrainedModel]


def build_model(model_type: str, depth: int, **settings: Any) -> PreTrainedModel:
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 32}
    config = AutoConfig.for_model(
        model_type, **{**SHAPES[model_type], **tokens, "num_hidden_layers": depth, **settings}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start equal in every layer: make every tensor of every layer tell-tale.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def load_model(state: TrainingState) -> PreTrainedModel:
    settings = dict(state.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    model.load_state_dict(state.tensors, strict=True)
    return model.eval()


def train(model: PreTrainedModel, steps: int, watch: Trajectory | None = None) -> dict[str, dict[str, Any]]:
    """A few AdamW steps on random tokens; returns the moments by parameter name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    family = family_of(model)
    for step in range(steps):
        tokens = torch.randint(0, 32, (2, 8), generator=generator)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            blocks = {n: p for n, p in model.named_parameters() if family.split(n)}
            watch.append(blocks, step + 1)
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


@pytest.fixture(scope="session")
def make_model() -> Build:
    return build_model


@pytest.fixture(scope="session")
def to_model() -> Callable[[TrainingState], PreTrainedModel]:
    return load_model


@pytest.fixture(scope="session")
def trained() -> Callable[..., tuple[TrainingState, Trajectory]]:
    """`trained(model_type, depth)` -> a training state after a few real steps, and the blocks' trajectory."""
    cache: dict[Any, tuple[TrainingState, Trajectory]] = {}

    def make(
        model_type: str, depth: int = 3, dtype: torch.dtype = torch.float32
    ) -> tuple[TrainingState, Trajectory]:
        key = (model_type, depth, dtype)
        if key not in cache:
            model = build_model(model_type, depth)
            nn.Module.to(model, dtype=dtype)
            trajectory = Trajectory(8)
            moments = train(model, 6, trajectory)
            tensors = dict(model.state_dict())
            cache[key] = (
                TrainingState(
                    config=model.config.to_dict(),
                    tensors=tensors,
                    moments=moments,
                    step=6,
                    extra={"position": 48},
                ),
                trajectory,
            )
        return cache[key]

    return make


@pytest.fixture(scope="session")
def block_names() -> Callable[[dict[str, Tensor], str], dict[int, dict[str, str]]]:
    return lambda tensors, model_type: block_tensors(tensors, family_of(model_type))
