"""Small real models on random tokens: enough to train, grow and resume in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

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
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            attention_dropout=dropout,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


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
