"""The Trainer of aiether's own runs: its optimizer, its schedules, its data order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from aiether.adaptive import LahrForCausalLM, set_auxiliary_scale
from aiether.data import TokenWindows
from aiether.growth import family_of
from aiether.integrations import causal_loss

from .config import TrainConfig
from .optimizer import build_optimizer


class PretrainingTrainer(Trainer):
    """A Trainer over token windows with the run's own optimizer and schedule."""

    def __init__(self, config: TrainConfig, **kwargs: Any) -> None:
        self.config = config
        super().__init__(**kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target: PreTrainedModel = self.accelerator.unwrap_model(self.model if model is None else model)
            set_auxiliary_scale(target, 1 / self.config.gradient_accumulation_steps)
            self.optimizer = build_optimizer(
                target,
                family_of(target).blocks,
                name=self.config.optimizer,
                lr=self.config.lr,
                weight_decay=self.config.weight_decay,
                betas=(self.config.adam_beta1, self.config.adam_beta2),
                table_lr=self.config.lahr_memory_lr,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            name, specific = scheduler_settings(self.config, num_training_steps)
            self.lr_scheduler = get_scheduler(
                name,
                optimizer=optimizer or self.optimizer,
                num_warmup_steps=min(self.config.lr_warmup_steps, num_training_steps // 2),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=specific,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """With `compile`, the output head and the loss are one compiled graph and no logits are returned."""
        if not self.config.compile:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        bare: Any = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            loss = causal_loss(bare, inputs["input_ids"], inputs["labels"], num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """A model that decides token by token what it computes also says what that came to."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, LahrForCausalLM):
            return super().evaluation_loop(*args, **kwargs)
        model.reset_compute_figures()
        output = super().evaluation_loop(*args, **kwargs)
        figures = {f"eval_{name}": value for name, value in model.compute_figures().items()}
        return output._replace(metrics={**(output.metrics or {}), **figures})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counted once a stage, with head and attention (evaluation.flops), not estimated every step


def scheduler_settings(config: TrainConfig, num_training_steps: int) -> tuple[str, dict[str, Any]]:
    """transformers' name and settings of the configured schedule, for this many steps."""
    if config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * num_training_steps))
        return "warmup_stable_decay", {"num_decay_steps": decay, "decay_type": "linear"}
    return config.schedule, {}


def build_arguments(config: TrainConfig, *, max_steps: int, output_dir: Path) -> TrainingArguments:
    """transformers' arguments for a run; it refuses here what the device cannot do."""
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    use_cpu = config.device == "cpu" or (config.device == "auto" and not accelerated)
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.lr,
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=config.log_interval_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_interval_steps or config.collect_interval_steps,
        save_strategy="steps",
        save_steps=config.save_interval_steps or max(1, max_steps // 10),
        save_total_limit=config.keep_checkpoints,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=use_cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not use_cpu,
        accelerator_config={"non_blocking": torch.cuda.is_available() and not use_cpu},
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


def build_trainer(
    config: TrainConfig,
    model: PreTrainedModel,
    train: TokenWindows,
    validation: TokenWindows,
    *,
    max_steps: int,
    output_dir: Path,
) -> PretrainingTrainer:
    """A silent Trainer (the display is ours) over windows that come in their own stateless order."""
    trainer = PretrainingTrainer(
        config,
        model=model,
        args=build_arguments(config, max_steps=max_steps, output_dir=output_dir),
        train_dataset=train,
        eval_dataset=validation,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
