"""Live models that cannot be grown where they stand, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aiether.growth import Family

_WRAPPERS = {
    "DistributedDataParallel": (
        "its hooks are registered once, and a layer that comes later would diverge between the ranks: grow "
        "model.module on every rank with the same plan and seed, then wrap it again"
    ),
    "DataParallel": "grow model.module, then wrap it again in DataParallel",
    "FullyShardedDataParallel": (
        "its structure is final at the first forward pass: save a full checkpoint, grow that, and shard the "
        "grown model"
    ),
    "FSDPModule": (
        "its structure is final at the first forward pass: save a full checkpoint, grow that, and call "
        "fully_shard on the grown model"
    ),
    "DeepSpeedEngine": (
        "ZeRO partitions parameters once: save a full checkpoint, grow that, and initialise the engine anew"
    ),
    "OptimizedModule": (
        "a compiled whole model compiles again at every growth and ends in eager mode: grow model._orig_mod, "
        "and compile its blocks instead, each with block.compile()"
    ),
}


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError, with the remedy, for a wrapped, sharded or spread model, or in inference mode."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "new tensors that are made in inference mode could not be trained: grow outside of "
            "torch.inference_mode()"
        )
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        for wrapper in _WRAPPERS.keys() & kinds:
            what = "the model" if not name else f"{name!r}"
            raise ValueError(f"{what} is wrapped in {wrapper}: {_WRAPPERS[wrapper]}")
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name or 'the model'!r} carries a hook of Accelerate that moves tensors between devices "
                "(device_map): load the model whole on one device"
            )


def check_in_place(model: nn.Module, family: Family) -> None:
    """Raise ValueError, with the remedy, if growing this bare model in place would go wrong.

    Models compiled as a whole, configurations that cannot be changed, parameters that are not plain, and
    pending gradients are refused.
    """
    _check_not_compiled_whole(model, family)
    _check_config(model, family.depth_key)
    _check_parameters(model)
    check_no_gradients(model.named_parameters())


def _check_not_compiled_whole(model: nn.Module, family: Family) -> None:
    parts = family.blocks.split(".")
    for length in range(len(parts) + 1):
        path = ".".join(parts[:length])
        module = model.get_submodule(path)
        _check_forward_not_compiled(module, path)
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{path or 'the model'!r} is compiled as a whole, which compiles again at every growth and "
                "ends in eager mode: build the model without it, and compile each block with block.compile()"
            )

    blocks = model.get_submodule(family.blocks)
    compiled = any(module._compiled_call_impl is not None for module in blocks.modules())
    if compiled and getattr(getattr(model, "config", None), "use_cache", False):
        raise ValueError(
            "with the generation cache every compiled block is a graph of its own, and the last ones run in "
            "eager mode: set model.config.use_cache = False"
        )


def _check_forward_not_compiled(module: nn.Module, path: str) -> None:
    if not is_compiled_function(module.forward):
        return
    if "forward" in vars(module):
        remedy = f"take it away again (del model{'.' + path if path else ''}.forward)"
    else:
        remedy = f"remove torch.compile from {type(module).__name__}.forward"
    raise ValueError(
        f"the forward of {path or 'the model'!r} is compiled as a whole, which compiles again at every "
        f"growth and ends in eager mode: {remedy}, and compile each block with block.compile()"
    )


def is_compiled_function(function: Any) -> bool:
    """Whether torch.compile made it; `functools.wraps` carries its mark on."""
    # What is excepted from compiling has the first mark too.
    return hasattr(function, "_torchdynamo_orig_callable") and not hasattr(function, "_torchdynamo_disable")


def _check_config(model: nn.Module, depth_key: str | None) -> None:
    config: Any = getattr(model, "config", None)
    if config is None or depth_key is None:
        return
    kind = type(config).__name__
    if isinstance(config, Mapping):
        raise ValueError(
            f"model.config is a {kind} that states the depth in {depth_key!r}: give the model an object with "
            "attributes, such as types.SimpleNamespace(**config), or keep the dict under another name"
        )
    try:
        setattr(config, depth_key, getattr(config, depth_key))
    except Exception as error:
        raise ValueError(
            f"model.config of class {kind} cannot be changed ({error}), and its {depth_key!r} must grow: "
            "make it an object whose attributes can be set, or keep it under another name"
        ) from error


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(f"{name!r} is partitioned by DeepSpeed: {_WRAPPERS['DeepSpeedEngine']}")
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"{name!r} is a DTensor, a part of a sharded model: {_WRAPPERS['FSDPModule']}")
        if type(parameter) is not nn.Parameter:
            raise ValueError(
                f"{name!r} is a {type(parameter).__name__}: only plain parameters can be grown; load the "
                "model unquantised"
            )
        if parameter.is_meta:
            raise ValueError(f"{name!r} has no data (it lies on the meta device): load the model whole first")
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name!r} has a hook that runs when its gradient is ready, which a new tensor would not "
                "have: remove such hooks, grow, and register them again for every parameter"
            )


def check_no_gradients(named: Iterable[tuple[str, Tensor]]) -> None:
    """Growth belongs between an optimizer step and the next backward pass.

    Raises
    ------
    ValueError
        If a tensor holds a gradient that is not zero: new tensors would miss what is accumulated so far.
    """
    for name, parameter in named:
        if parameter.grad is not None and bool(torch.any(parameter.grad != 0)):
            raise ValueError(
                f"{name!r} holds a gradient: grow after optimizer.step() and optimizer.zero_grad(), not "
                "while gradients are pending"
            )
