"""The optimizer file of a Hugging Face Trainer, grown with the model.

Trainer keys moments by position: within a group in the order of `named_parameters()`, groups by whether
weight decay applies. Both orders are made anew from the model's class, on no device, before and after.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from aiether.growth import Family, GrowthConfig, GrowthPlan, new_moments, renames
from aiether.growth.blank import without_weights

from ._sources import ModelConfig

Groups = list[list[str]]
_NEIGHBOURS = "its moments would go to other parameters"
_ALONE = "remove it to grow the weights alone"


def grow_optimizer(
    source: Path,
    *,
    before: ModelConfig,
    after: dict[str, Any],
    plan: GrowthPlan,
    family: Family,
    growth: GrowthConfig,
) -> Callable[[Path], None]:
    """What writes the grown `optimizer.pt`, from which `Trainer.train(resume_from_checkpoint=...)` goes on.

    Old moments are copied bit by bit, those of new tensors start as `growth.moments` says. Neither lies in
    memory: what is read is mapped from the file, and zeros are mapped from a hole.

    Raises
    ------
    ValueError
        If the file holds more than tensors and settings (it is never unpickled freely), or its groups and
        shapes are not those that a Trainer makes for this model.
    """
    old = _load(source)
    model = meta_model(before.full)
    names = _group_names(source, old, model)
    positions = dict(enumerate(name for group in names for name in group))
    _check_shapes(source, old["state"], positions, model)
    new_names = renames(positions.values(), plan, family)
    if all("param_names" in group for group in old["param_groups"]):
        groups = [[new for name in group for new in new_names[name]] for group in names]
    else:
        groups = trainer_groups(meta_model(after))
    places = {name: place for place, name in enumerate(name for group in groups for name in group)}
    lost = sorted(new for names in new_names.values() for new in names if new not in places)
    if lost:
        raise ValueError(
            f"{source} has moments for {lost[0]!r}, which the grown model has under another name, since its "
            f"layers share tensors: {_ALONE}"
        )

    def write(target: Path) -> None:
        with _Zeros(target) as zeros:
            state = _grown_state(source, old, positions, new_names, places, growth, zeros)
            grown = {**old, "state": state, "param_groups": _grown_groups(old["param_groups"], groups)}
            torch.save(grown, target)

    return write


def meta_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a configuration dict, without memory for its weights.

    Raises
    ------
    ValueError
        If transformers has no class for it.
    """
    kinds = config.get("architectures") or [""]
    known = getattr(transformers, str(kinds[0]), None)
    try:
        parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        with without_weights():
            if isinstance(known, type) and issubclass(known, PreTrainedModel):
                return known(parsed)
            return AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"transformers builds no {kinds[0] or config.get('model_type')!r} from this configuration, so "
            f"the order of its optimizer's parameters is not known: {_ALONE}"
        ) from error


def trainer_groups(model: PreTrainedModel) -> Groups:
    """The names in each of the two groups that `Trainer.create_optimizer` makes."""
    # The method asks nothing of its Trainer.
    decayed = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
    names = [name for name, _ in model.named_parameters()]
    return [[name for name in names if name in decayed], [name for name in names if name not in decayed]]


def _load(path: Path) -> dict[str, Any]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of an old format cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path} is damaged or holds more than tensors and settings ({reason}), which could run code "
            f"and is not read: {_ALONE}, or save it with an optimizer of torch"
        ) from error
    if not isinstance(loaded, dict) or not {"state", "param_groups"} <= loaded.keys():
        raise ValueError(f"{path} is no optimizer's state: {_ALONE}")
    return loaded


def _group_names(path: Path, optimizer: Mapping[str, Any], model: PreTrainedModel) -> Groups:
    """The names in each group: those in the file, or the Trainer's order if the sizes are the Trainer's."""
    saved = optimizer["param_groups"]
    if all("param_names" in group for group in saved):
        return [list(group["param_names"]) for group in saved]
    groups = trainer_groups(model)
    held, expected = [len(group["params"]) for group in saved], [len(group) for group in groups]
    if held != expected:
        raise ValueError(
            f"{path} has groups of {held} parameters, a Trainer makes {expected} for this model (frozen "
            f"parameters and groups of your own cannot be told by position): {_NEIGHBOURS}; give your "
            f"optimizer named parameters, or {_ALONE}"
        )
    return groups


def _check_shapes(
    path: Path, state: Mapping[int, Mapping[str, Any]], positions: Mapping[int, str], model: PreTrainedModel
) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for place, entries in state.items():
        name = positions.get(place)
        if name is None or name not in shapes:
            raise ValueError(f"{path} has moments for parameter {place} ({name}), which the model lacks")
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim and not _fits(tuple(value.shape), shapes[name]):
                raise ValueError(
                    f"{key} of parameter {place} in {path} is {tuple(value.shape)}, {name!r} is "
                    f"{shapes[name]}: {_NEIGHBOURS}; take the optimizer of this model, or {_ALONE}"
                )


def _fits(moment: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a moment has its parameter's shape, or is the row or column of a factored one."""
    return moment in (parameter, parameter[:-1], parameter[:-2] + parameter[-1:], (1,))


def _grown_state(
    source: Path,
    old: Mapping[str, Any],
    positions: Mapping[int, str],
    new_names: Mapping[str, Sequence[str]],
    places: Mapping[str, int],
    growth: GrowthConfig,
    zeros: Callable[[Tensor], Tensor],
) -> dict[int, dict[str, Any]]:
    grown: dict[int, dict[str, Any]] = {}
    if growth.moments == "reset":
        return grown
    most = max(len(names) for names in new_names.values())
    for number in range(most):
        # Each copy is loaded anew: what is saved twice would be loaded as one tensor under two names.
        state = (old if number == 0 or growth.moments != "copy" else _load(source))["state"]
        for place, entries in state.items():
            names = new_names[positions[place]]
            if number >= len(names):
                continue
            made = entries if number == 0 else new_moments(
                entries, growth.moments, zeros=zeros, copy=lambda tensor: tensor
            )  # fmt: skip
            if made:  # none: the optimizer begins as with a tensor that it has not seen
                grown[places[names[number]]] = made
    return dict(sorted(grown.items()))


def _grown_groups(saved: Sequence[Mapping[str, Any]], groups: Groups) -> list[dict[str, Any]]:
    result, start = [], 0
    for settings, names in zip(saved, groups, strict=True):
        grown = {**settings, "params": list(range(start, start + len(names)))}
        if "param_names" in settings:
            grown["param_names"] = names
        result.append(grown)
        start += len(names)
    return result


class _Zeros:
    """Zeros that take neither memory nor room on the disk: each is mapped from the same hole in a file."""

    def __init__(self, beside: Path) -> None:
        self.path = beside.with_name(f".{beside.name}.zeros")

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        self.path.touch()
        return self._like

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.path.unlink(missing_ok=True)

    def _like(self, tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return torch.zeros_like(tensor)
        with self.path.open("r+b") as file:
            file.truncate(max(self.path.stat().st_size, tensor.nbytes))
        flat = torch.from_file(str(self.path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        return flat.view(tensor.shape)
