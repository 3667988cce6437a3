"""What `fit` reads off a user's Trainer before it starts, and what it refuses there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer

from aiether.growth import (
    GROWTH_PRESETS,
    PLACEMENTS,
    Family,
    GrowthConfig,
    GrowthPlan,
    block_tensors,
    depth_schedule,
    family_of,
    planned_depth,
    shared_names,
    silenced,
)

from ._described import check_described, check_nothing_attached
from ._growth_callback import GrowthCallback
from ._memory import Workload
from ._model import check_plan_fits
from ._verify import check_blocks, check_one_device

_NEEDS_LOSS = ("geometric", "plateau", "lag")


def growth_config(trainer: Trainer, growth: GrowthConfig | str | None) -> GrowthConfig:
    carried = growth_callbacks(trainer)
    if isinstance(growth, GrowthConfig):
        return growth
    if growth is None and carried:
        return carried[0].growth
    name = growth or "recommended"
    if name not in GROWTH_PRESETS:
        raise ValueError(
            f"growth={name!r} is no preset; choose one of {sorted(GROWTH_PRESETS)} or pass a GrowthConfig"
        )
    return GrowthConfig(**GROWTH_PRESETS[name])


def growth_callbacks(trainer: Trainer) -> list[GrowthCallback]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, GrowthCallback)]


def check_cuda_graphs(trainer: Trainer, compiled: bool) -> None:
    """Refuse what CUDA graphs cannot serve."""
    device = trainer.args.device.type
    if not compiled or device != "cuda":
        raise ValueError(
            f"cuda_graphs=True needs compile=True and a CUDA device (compile={compiled}, device {device!r}): "
            "leave it False"
        )
    if trainer.args.gradient_checkpointing or getattr(trainer.model, "is_gradient_checkpointing", False):
        raise ValueError(
            "cuda_graphs=True cannot run blocks a second time in the backward pass: set it to False, or "
            "leave gradient checkpointing off"
        )
    if trainer.args.gradient_accumulation_steps > 1:
        raise ValueError(
            "cuda_graphs=True cannot accumulate gradients: the next forward pass takes their memory again; "
            "set it to False, or gradient_accumulation_steps=1"
        )


def refuse_unsupported(trainer: Trainer, config: GrowthConfig, *, compiled: bool) -> None:
    args = trainer.args
    if type(trainer.model).__name__ == "OptimizedModule":
        raise ValueError(
            "the Trainer's model is compiled as a whole: give it the model itself and call "
            "fit(trainer, compile=True), which compiles the blocks of every stage"
        )
    if not isinstance(trainer.model, PreTrainedModel):
        raise ValueError(f"fit needs a transformers model, not {type(trainer.model).__name__}")
    if trainer.model_init is not None:
        raise ValueError(
            "the Trainer has model_init, which would rebuild the small model at every stage; pass model="
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True compiles the whole model, again at every growth, and falls back to eager "
            "after 8 times; set it to False and call fit(trainer, compile=True), which compiles the blocks"
        )
    sharded = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "a model spread by device_map": trainer.is_model_parallel,
    }
    for backend, used in sharded.items():
        if used:
            raise ValueError(f"fit grows a whole model on one device so far, not {backend}: train without it")
    check_one_device(args)
    if isinstance(trainer.optimizer, AcceleratedOptimizer):
        raise ValueError(
            "the Trainer was trained before, and its optimizer and schedule are used up; make a new Trainer "
            "with the same arguments (fit(trainer, resume=True) then goes on from fit's newest checkpoint)"
        )
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True would show the same data again after every growth; set it to False"
        )
    if args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end would load a model of another depth; set it to False")
    if config.trigger in _NEEDS_LOSS and (trainer.eval_dataset is None or args.eval_strategy == "no"):
        raise ValueError(
            f"the {config.trigger} trigger decides at evaluations: give the Trainer an eval_dataset and "
            "eval_strategy='steps', or use the triggers fixed, random or never"
        )
    if isinstance(trainer.eval_dataset, dict):
        raise ValueError(
            "fit needs one eval_dataset, not a dictionary of several: the trigger follows one loss"
        )
    if trainer.lr_scheduler is not None and (config.protocol == "report" or config.lr_policy == "restart"):
        what = "protocol='report'" if config.protocol == "report" else "lr_policy='restart'"
        raise ValueError(
            f"{what} restarts the schedule, which a scheduler passed in optimizers=(...) cannot; "
            "set lr_scheduler_type in TrainingArguments instead, or protocol='none' and another lr_policy"
        )
    family = family_of(trainer.model)
    check_blocks(trainer.model, family)
    check_nothing_attached(trainer.model, family, compiled=compiled)
    check_described(trainer.model)
    check_growths(trainer.model, family, config)
    if config.probes:
        _check_probes(trainer)


def check_growths(model: PreTrainedModel, family: Family, config: GrowthConfig) -> None:
    """Carry out without data every growth that may come: one that cannot be is to be known now.

    Of several forms (lag_candidates) each is followed from the first growth to the last by itself.

    Raises
    ------
    ValueError
        Naming the first growth that is impossible, and why.
    """
    if config.trigger == "never" or (config.dry_run and not config.probes):
        return
    depth = model.config.num_hidden_layers
    depths = (depth, *depth_schedule(config, depth, final_depth=planned_depth(config, depth)))
    if config.trigger == "fixed":
        depths = depths[: len(config.growth_fractions) + 1]
    tensors = model.state_dict()
    shared = shared_names(tensors, family)
    inner_shared = frozenset(parts[1] for name in shared if (parts := family.split(name)))
    for placement, init in config.forms():
        grown = model
        for before, after in pairwise(depths):
            plan = GrowthPlan(before, PLACEMENTS[placement](before, after), init, placement)
            try:
                if init == "zero":
                    silenced(family, block_tensors(tensors, family)[0], inner_shared)
                grown = check_plan_fits(grown, plan, family)
            except ValueError as error:
                raise ValueError(
                    f"the growth from {before} to {after} layers ({placement}, {init}) cannot be: {error}"
                ) from error


def _check_probes(trainer: Trainer) -> None:
    """Refuse what forks cannot be compared on."""
    if trainer.eval_dataset is None:
        raise ValueError("a probe compares validation losses: give the Trainer an eval_dataset")
    if trainer.args.fp16:
        raise ValueError(
            "fp16's loss scale belongs to the process, so forks would change it: set bf16=True to probe"
        )
    if workload(trainer) is None:
        raise ValueError(
            "a probe compares at equal FLOPs, and the sequences' length cannot be seen: pass a train_dataset "
            "with a length whose items hold input_ids, or another trigger without lag_candidates"
        )


def planned_steps(trainer: Trainer) -> tuple[int, int]:
    """(total optimizer steps, steps per epoch), as the Trainer itself counts them."""
    if isinstance(trainer.train_dataset, IterableDataset) and trainer.args.max_steps <= 0:
        raise ValueError("an iterable dataset has no length: set max_steps in TrainingArguments")
    values: Any = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return values[6], values[1]


def save_interval(trainer: Trainer, total_steps: int, steps_per_epoch: int) -> int | None:
    args = trainer.args
    match str(getattr(args.save_strategy, "value", args.save_strategy)):
        case "no":
            return None
        case "epoch":
            return steps_per_epoch
        case "steps":
            return (
                int(args.save_steps) if args.save_steps >= 1 else max(1, round(args.save_steps * total_steps))
            )
        case other:
            raise ValueError(
                f"save_strategy={other!r} does not fit a growing model; use 'steps', 'epoch' or 'no'"
            )


def workload(trainer: Any) -> Workload | None:
    """What a training step consists of; None where the length of the sequences cannot be seen beforehand."""
    args, dataset = trainer.args, trainer.train_dataset
    if isinstance(dataset, IterableDataset) or not len(dataset) or "input_ids" not in dataset[0]:
        return None
    adam = "adam" in str(args.optim) and type(trainer).create_optimizer is Trainer.create_optimizer
    return Workload(
        batch_size=args.per_device_train_batch_size,
        context_length=len(dataset[0]["input_ids"]),
        accumulation=args.gradient_accumulation_steps,
        moments_per_weight=2 if adam and trainer.optimizer is None else 1,
        bf16=args.bf16,
    )
