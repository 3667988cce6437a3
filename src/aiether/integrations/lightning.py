"""Growth in a Lightning Trainer: a callback that grows the module's model in place (`aiether[lightning]`).

Lightning restores optimizers by position and calls no callback before it loads the weights. So the callback
keeps the plans that it carried out in the checkpoint, and on resume grows the fresh module by them before the
weights are loaded and the optimizers are built: every tensor then finds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "aiether.integrations.lightning needs Lightning: pip install 'aiether[lightning]'"
    ) from error

from aiether.growth import (
    GROWTH_PRESETS,
    Family,
    GrowthConfig,
    GrowthController,
    GrowthPlan,
    depth_of,
    family_of,
    planned_depth,
)

from ._grow import grow, grow_live
from ._grow_optimizer import unwrap_optimizers
from ._grow_report import GrowthReport
from ._lr_policy import Rewarm
from ._verify import refuse_probes


class GrowthCallback(Callback):
    """Grows `pl_module.model` when the trigger says so, between two batches.

    `reports` lists what was done in this process; `rewarms` are the re-warms under way (more than one
    where growths follow each other soon).

    Parameters
    ----------
    growth
        What to do: a configuration, or a preset's name. Its protocol must be "none".
    model
        The attribute of the LightningModule that holds the model.
    family
        Where the model's blocks are; default: found by structure.
    monitor
        The logged metric that triggers follow: the mean validation loss in nats.
    seed
        What is drawn for new layers depends on it.
    compile_block
        How to compile the copy of a compiled block.
    """

    def __init__(
        self,
        growth: GrowthConfig | str = "recommended",
        *,
        model: str = "model",
        family: Family | None = None,
        monitor: str = "val_loss",
        seed: int = 0,
        compile_block: Callable[[nn.Module], object] = nn.Module.compile,
    ) -> None:
        if isinstance(growth, str):
            if growth not in GROWTH_PRESETS:
                raise ValueError(f"growth={growth!r} is no preset; choose one of {sorted(GROWTH_PRESETS)}")
            growth = GrowthConfig(**GROWTH_PRESETS[growth])
        growth.validate()
        refuse_probes(growth)
        if growth.protocol != "none":
            raise ValueError(
                f"protocol={growth.protocol!r} freezes and restarts, which only fit drives: set "
                "protocol='none', and lr_policy='rewarm_new' for a gentle start"
            )
        self.growth, self.model, self.monitor, self.seed = growth, model, monitor, seed
        self.family = family
        self.compile_block = compile_block
        self.controller: GrowthController | None = None
        self.reports: list[GrowthReport] = []
        self.rewarms: list[Rewarm] = []
        self._plans: list[GrowthPlan] = []
        self._pending: GrowthPlan | None = None
        self._restored: Mapping[str, Any] | None = None
        self._steps_seen = 0
        self._between_steps = True

    # -- Lightning's events ----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _refuse(trainer, pl_module)
        load = pl_module.on_load_checkpoint

        def regrow_and_load(checkpoint: dict[str, Any]) -> None:
            self._regrow(pl_module, checkpoint)
            load(checkpoint)

        # The only event before the weights are loaded and the optimizers are built.
        vars(pl_module)["on_load_checkpoint"] = regrow_and_load

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self._model(pl_module)
        depth = self._plans[0].depth_before if self._plans else depth_of(model, self.family)
        self.controller = GrowthController(
            self.growth,
            self.family or family_of(model),
            depth=depth,
            total_steps=int(trainer.estimated_stepping_batches),
            seed=self.seed,
            final_depth=planned_depth(self.growth, depth),
        )
        if self._restored is not None:
            snapshots = self._restored["snapshots"]
            device = next(model.parameters()).device
            self.controller.load_state_dict(self._restored["controller"], snapshots.__getitem__, device)
            self.rewarms = [
                Rewarm.resume(model, trainer.optimizers, state) for state in self._restored["rewarms"]
            ]
            self._restored = None
        self._steps_seen = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A growth that was decided takes place here: after a whole step, in training mode."""
        if self._pending is not None and self._between_steps:
            plan, self._pending = self._pending, None
            self._grow(trainer, self._model(pl_module), plan)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._between_steps = step > self._steps_seen  # else in the midst of accumulation
        if not self._between_steps:
            return
        self._steps_seen = step
        assert self.controller is not None
        if self.controller.wants_snapshot(step):
            self.controller.snapshot(step, dict(self._model(pl_module).named_parameters()))
        if self.controller.wants_evaluation(step):  # a growth by the clock does not wait for a validation
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            self._pending = self.controller.evaluate(step, float(loss)).plan

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.controller is None or self._pending is not None:
            return
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None:
            raise ValueError(
                f"no metric {self.monitor!r} was logged in validation (there are: "
                f"{', '.join(trainer.callback_metrics) or 'none'}): log it, or name yours with monitor="
            )
        self._pending = self.controller.evaluate(trainer.global_step, float(metric)).plan

    def state_dict(self) -> dict[str, Any]:
        """The plans so far, and all that the controller and a re-warm have in hand."""
        if self.controller is None:
            return {}
        trajectory = self.controller.trajectory
        return {
            "plans": [plan.to_dict() for plan in self._plans],
            "pending": None if self._pending is None else self._pending.to_dict(),
            "controller": self.controller.state_dict(),
            "snapshots": {step: dict(trajectory.snapshot_items(step)) for step in trajectory.steps},
            "rewarms": [rewarm.state_dict() for rewarm in self.rewarms if not rewarm.finished],
        }

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if state := checkpoint["callbacks"].get(self.state_key):
            parameters = self._model(pl_module).named_parameters()
            state["trainable"] = [name for name, p in parameters if p.requires_grad]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._restored = state_dict
        self._plans = [GrowthPlan.from_dict(plan) for plan in state_dict["plans"]]
        pending = state_dict["pending"]
        self._pending = None if pending is None else GrowthPlan.from_dict(pending)

    # -- growing ---------------------------------------------------------------------------------------

    def _model(self, pl_module: LightningModule) -> nn.Module:
        model = getattr(pl_module, self.model, None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{type(pl_module).__name__} has no module {self.model!r}: name the attribute that holds the "
                "model, GrowthCallback(model=...)"
            )
        return model

    def _grow(self, trainer: Trainer, model: nn.Module, plan: GrowthPlan) -> None:
        assert self.controller is not None
        controller = self.controller
        for (
            optimizer
        ) in trainer.optimizers:  # Lightning clears them in the next step, before the backward pass
            optimizer.zero_grad()
        report = grow_live(
            model,
            plan,
            lambda state: controller.grow(state, plan),
            family=controller.family,
            settings=self.growth,
            optimizers=unwrap_optimizers(trainer.optimizers),
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            step=trainer.global_step,
            compile_block=self.compile_block,
        )
        self.rewarms = [one for one in (*self.rewarms, report.rewarm) if one and not one.finished]
        self.reports.append(report)
        self._plans.append(plan)

    def _regrow(self, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Give a fresh module the depth, and the trainable tensors, that the checkpoint's had."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state or not state["plans"]:
            return
        model = self._model(pl_module)
        plans = [GrowthPlan.from_dict(plan) for plan in state["plans"]]
        depths, depth = [plans[0].depth_before, *(p.depth_after for p in plans)], depth_of(model, self.family)
        if depth not in depths:
            raise ValueError(
                f"the checkpoint's model grew through {depths} layers, this one has {depth}: build "
                f"the module as for the first start, with {depths[0]}"
            )
        for plan in plans[depths.index(depth) :]:
            grow(
                model, replace(plan, init="copy"), optimizer=None, family=self.family
            )  # the weights are loaded next
        trainable = set(state["trainable"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)


def _refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    if trainer.world_size > 1:
        raise ValueError(
            f"growth works on one device so far (found {trainer.world_size} processes): set devices=1"
        )
    if not pl_module.automatic_optimization:
        raise ValueError(
            "with manual optimization call aiether.grow(...) in training_step, after optimizer.zero_grad()"
        )
