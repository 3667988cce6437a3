"""The checks after every growth: nothing trainable is left out of the optimizer, and what is new trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from aiether.growth import Family, GrowthConfig

from ._model import blocks_of


class GrowthError(RuntimeError):
    """The state after a growth is not what the plan promised. Training stops instead of going on wrongly."""


def check_one_device(args: TrainingArguments) -> None:
    """Raise ValueError if the Trainer works on several GPUs or in several processes."""
    if args.n_gpu > 1 or args.world_size > 1:
        raise ValueError(
            f"growth works on one device so far (found {args.n_gpu} GPUs, {args.world_size} processes); set "
            "CUDA_VISIBLE_DEVICES to one GPU and start one process"
        )


def refuse_probes(config: GrowthConfig) -> None:
    """Raise ValueError where a loop that is not ours cannot be forked."""
    if config.probes:
        raise ValueError(
            f"trigger {config.trigger!r} with lag_candidates {config.lag_candidates} trains forks of the "
            "model, which only aiether.fit(trainer) and aiether train do: use another trigger, without "
            "lag_candidates"
        )


def check_blocks(model: PreTrainedModel, family: Family) -> None:
    """The configuration and the blocks agree on how many layers there are and which is which.

    Raises
    ------
    ValueError
        If a layer was put in by hand: a forward pass may skip what the configuration does not know, and a
        copied layer index makes two layers share one place in the generation cache.
    """
    stated, blocks = family.depth(model.config.to_dict()), blocks_of(model, family)
    if stated != len(blocks):
        raise ValueError(
            f"the configuration states {stated} layers, the model has {len(blocks)}: build the model anew "
            f"from a configuration with {family.depth_key}={len(blocks)}"
        )
    for position, block in enumerate(blocks):
        for name, module in block.named_modules():
            index = getattr(module, "layer_idx", None)
            if index is not None and index != position:
                raise ValueError(
                    f"layer {position} has layer_idx={index} in {name or 'its block'!r}: it was moved or "
                    "copied by hand, which corrupts generation with a cache; build the model anew from its "
                    "configuration and load the state dict"
                )


def check_optimizer_covers(model: nn.Module, optimizer: Optimizer) -> None:
    """Every trainable tensor is in the optimizer, once, and the optimizer holds nothing else.

    Raises
    ------
    GrowthError
        Naming the tensors that would never train, train twice, or belong to another model.
    """
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    known = {id(p): name for name, p in model.named_parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in set(held)]
    foreign = [i for i in held if i not in known]
    if missing:
        raise GrowthError(f"{len(missing)} trainable tensors are not in the optimizer, first {missing[0]!r}")
    if foreign:
        raise GrowthError(
            f"the optimizer holds {len(foreign)} tensors that are not the model's: it would train those"
        )
    if len(set(held)) != len(held):
        raise GrowthError("a tensor is in the optimizer twice: it would be stepped twice")


class NewTensorWatch:
    """Sees that each new tensor receives a gradient and moves within a few steps."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, names: Iterable[str], steps: int = 5) -> None:
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names if parameters[name].requires_grad}
        self.start: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.largest_pull = dict.fromkeys(self.parameters, 0.0)
        self.steps_left = steps

    def before_step(self, factor: float = 1.0) -> None:
        """Call with gradients present, before the optimizer steps; a step at zero rate does not count.

        `factor` is what the new tensors move by, relative to their group's learning rate.
        """
        rates = {name: factor * float(self.group_of[id(p)]["lr"]) for name, p in self.parameters.items()}
        if max(rates.values(), default=0.0) <= 0:
            return
        self.steps_left -= 1
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                pull = rates[name] * float(parameter.grad.abs().max())
                self.largest_pull[name] = max(self.largest_pull[name], pull)

    def finished(self) -> bool:
        """True when the watch is over.

        Raises
        ------
        GrowthError
            If a new tensor had no gradient in all of the watched steps, or did not move although its gradient
            times the learning rate was more than rounding hides.
        """
        if self.steps_left > 0:
            return False
        idle = sorted(name for name, pull in self.largest_pull.items() if pull == 0)
        if idle:
            raise GrowthError(f"{len(idle)} new tensors received no gradient after growth, first {idle[0]!r}")
        still = sorted(name for name, pull in self.largest_pull.items() if self._still(name, pull))
        if still:
            raise GrowthError(f"{len(still)} new tensors did not move after growth, first {still[0]!r}")
        return True

    def _still(self, name: str, pull: float) -> bool:
        value = self.parameters[name].detach()
        rounding = torch.finfo(value.dtype).eps * float(value.abs().max())
        return pull > rounding and torch.equal(value, self.start[name])
