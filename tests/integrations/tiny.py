"""Small real models on random tokens: enough to train, grow and resume in seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from aiether.growth import family_of
from aiether.integrations._model import blocks_of

VOCAB, CONTEXT = 32, 16


def tiny_model(arch: str = "gpt2", depth: int = 2, dropout: float = 0.1, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    if arch == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=CONTEXT,
                n_embd=16,
                n_head=2,
                n_layer=depth,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "attention_dropout": dropout,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if arch == "qwen3":  # alternating layer types: a configuration list with one entry a layer
        types = ["full_attention" if layer % 2 == 0 else "sliding_attention" for layer in range(depth)]
        config = Qwen3Config(
            **shape, head_dim=8, use_sliding_window=True, sliding_window=4, layer_types=types, pad_token_id=0
        )
        return Qwen3ForCausalLM(config)
    if arch == "phi":  # its output head has a bias
        return PhiForCausalLM(PhiConfig(**{**shape, "num_key_value_heads": 2}))
    return LlamaForCausalLM(LlamaConfig(**shape))


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Noisy arithmetic sequences modulo the vocabulary: learnable in a few steps."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCAB, (length, 1), generator=generator)
        stride = torch.randint(1, 4, (length, 1), generator=generator)
        self.tokens = (start + stride * torch.arange(CONTEXT)) % VOCAB

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index].clone()}


def tiny_trainer(tmp_path: Path, model: PreTrainedModel | None = None, **settings: Any) -> Trainer:
    """A plain Trainer as a user would build it."""
    optimizers = settings.pop("optimizers", (None, None))
    callbacks = settings.pop("callbacks", None)
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 24,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = Trainer(
        model=model or tiny_model(),
        args=TrainingArguments(**{**arguments, **settings}),
        train_dataset=Sequences(40, seed=1),
        eval_dataset=Sequences(8, seed=2),
        optimizers=optimizers,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def blocks(model: nn.Module) -> nn.ModuleList:
    assert isinstance(model, PreTrainedModel)
    return blocks_of(model, family_of(model))


def append_copy(model: PreTrainedModel, *, tell_config: bool = True) -> None:
    """The naive growth: append a copy of the last block to the live model."""
    blocks(model).append(copy.deepcopy(blocks(model)[-1]))
    if tell_config:
        model.config.num_hidden_layers = len(blocks(model))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = module.state_dict()
    assert now.keys() == before.keys()
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


class AtStep(TrainerCallback):
    """Does something to the live model after a step, as users' callbacks do."""

    def __init__(self, step: int, action: Callable[..., None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(kwargs["model"], kwargs["optimizer"])
