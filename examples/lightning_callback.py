"""Growth in a Lightning Trainer by a callback, and a second run that resumes after the growth.

Needs the extra: pip install 'aiether[lightning]'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from aiether import GrowthConfig
from aiether.integrations.lightning import GrowthCallback


class LanguageModel(LightningModule):
    """Always built with the depth of the first start: the callback grows it when a checkpoint is loaded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(count: int, seed: int) -> DataLoader[torch.Tensor]:
    start = torch.randint(32, (count, 1), generator=torch.Generator().manual_seed(seed))
    return DataLoader((start + torch.arange(16)) % 32, batch_size=8)  # type: ignore[arg-type]


def fit(folder: Path, max_steps: int, resume: Path | None = None) -> tuple[LanguageModel, GrowthCallback]:
    growth = GrowthConfig(
        trigger="fixed", growth_fractions=(0.5,), placement="stack", grow_by="double", init="noise",
        protocol="none", lr_policy="rewarm_new", rewarm_steps=8,
    )  # fmt: skip
    module, callback = LanguageModel(), GrowthCallback(growth)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="auto",
        devices=1,
        callbacks=[
            callback,
            ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}"),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(80, seed=1), data(16, seed=2), ckpt_path=resume)
    for report in callback.reports:
        print(report)
    print(f"step {trainer.global_step}: {module.model.config.num_hidden_layers} layers")
    return module, callback


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder), max_steps=40)  # grows at step 20
        fit(Path(folder) / "resumed", max_steps=40, resume=Path(folder) / "step=30.ckpt")


if __name__ == "__main__":
    main()
