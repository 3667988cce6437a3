"""Growth as a callback: whole under `fit`, one growth at a time in a bare `trainer.train()`.

A callback cannot swap the Trainer's model. In a bare `trainer.train()` it therefore watches, and when the
trigger decides it stops the training, writes a checkpoint of the grown model and says how to go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from aiether.growth import Decision, GrowthConfig, GrowthController, family_of, planned_depth

from ._checkpoint import CheckpointStore, RunRecord, to_json
from ._model import frozen_names, grow_model
from ._optimizer_state import capture_moments, scheduler_state, unwrap_optimizer
from ._quiet import without_progress_bars
from ._verify import check_blocks, check_one_device, refuse_probes

logger = logging.get_logger("aiether")


class GrowthCallback(TrainerCallback):
    """Carries `growth` among a Trainer's callbacks; `aiether.fit(trainer)` takes it from there.

    In a bare `trainer.train()`, `grown_checkpoint` names the folder that was written, or stays None.
    """

    def __init__(self, growth: GrowthConfig) -> None:
        growth.validate()
        self.growth = growth
        self.controller: GrowthController | None = None
        self.decision: Decision | None = None
        self.grown_checkpoint: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        refuse_probes(self.growth)
        check_one_device(args)
        check_blocks(model, family_of(model))
        depth = model.config.num_hidden_layers
        self.controller = GrowthController(
            self.growth,
            family_of(model),
            depth=depth,
            total_steps=state.max_steps,
            seed=args.seed,
            final_depth=planned_depth(self.growth, depth),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.controller is not None
        if self.controller.wants_snapshot(state.global_step):
            self.controller.snapshot(state.global_step, dict(kwargs["model"].named_parameters()))
        if self.controller.wants_evaluation(state.global_step):
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = (kwargs.get("metrics") or {}).get("eval_loss")
        if loss is None or self.controller is None:
            return
        self.decision = self.controller.evaluate(state.global_step, loss)
        control.should_training_stop = control.should_training_stop or self.decision.plan is not None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.decision is None or self.decision.plan is None:
            return
        assert self.controller is not None
        model, optimizer, step = kwargs["model"], unwrap_optimizer(kwargs["optimizer"]), state.global_step
        frozen = frozen_names(model)
        growth = grow_model(
            model, capture_moments(model, optimizer), self.controller, self.decision.plan, step
        )

        def save_model(directory: Path) -> None:
            with without_progress_bars():
                growth.model.save_pretrained(directory)
            state.save_to_json(str(directory / "trainer_state.json"))

        checkpoint = CheckpointStore(Path(args.output_dir or "trainer_output")).write(
            step=step,
            stage=self.controller.num_growths,
            save_model=save_model,
            moments=growth.migration.state.moments,
            record=RunRecord(
                total_steps=state.max_steps,
                controller=to_json(self.controller.state_dict()),
                frozen=sorted(new for name in frozen for new in growth.renames[name]),
                scheduler={"restart_step": None, "state": scheduler_state(kwargs["lr_scheduler"])},
                new_layers=list(self.decision.plan.new_layers),
                optimizer=type(optimizer).__name__,
            ),
        )
        self.grown_checkpoint = checkpoint.path
        logger.warning(
            f"step {step}: {self.decision.plan.describe()}. A Trainer cannot go on with another model, so "
            f"training stopped, and the grown state lies in {checkpoint.path}. Go on with "
            "aiether.fit(trainer, resume=True) on a Trainer with the same arguments."
        )
