"""Growth under a Hugging Face Trainer: `aiether.fit` drives the stages, the callback says how to grow."""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import aiether
from aiether.callbacks import ProceduralGrowthCallback


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Counting modulo 32 from random starts."""

    def __init__(self, length: int, seed: int) -> None:
        start = torch.randint(32, (length, 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = (start + torch.arange(16)) % 32

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> aiether.FitResult:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=16, n_embd=32, n_head=4, n_layer=2, bos_token_id=0, eos_token_id=0
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, max_steps=40, per_device_train_batch_size=8, learning_rate=3e-3,
                eval_strategy="steps", eval_steps=4, logging_steps=10, report_to="none", disable_tqdm=True,
            ),
            train_dataset=Counting(320, seed=1),
            eval_dataset=Counting(16, seed=2),
            callbacks=[
                ProceduralGrowthCallback(
                    patience=1, threshold=0.5, warmup_steps=8, strategy="copy",
                    growth_params={
                        "trigger": "plateau", "placement": "stack", "grow_by": "double", "protocol": "none",
                    },
                )
            ],
        )  # fmt: skip
        result = aiether.fit(trainer)
    print(f"{result.status} at step {result.step}: {result.depth} layers after {result.num_growths} growth")
    return result


if __name__ == "__main__":
    main()
