"""The blocks of a live model: new ones made from their sources, and the list rebuilt in place.

Whatever changes the model leaves its inverse on an ExitStack, so that a failure later undoes it.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from aiether.growth import Family, GrowthPlan, block_tensors, index_attributes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RUNTIME_HOOKS = (
    *_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_RUNTIME_HOOKS}
_ATOMIC = (int, float, complex, bool, str, bytes, type, type(None))
_LAYER_INDEX = "layer_idx"


def block_list(model: nn.Module, family: Family) -> nn.Module:
    """The container of the blocks, whose children are called 0, 1, 2 ...

    Raises
    ------
    ValueError
        If the model has none at the family's path, or one module stands at two places in it.
    """
    try:
        container = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise ValueError(
            f"the model has no block list {family.blocks!r}: pass the bare model (unwrap it first), or name "
            "the list: family=aiether.growth.family_of(model, blocks=...)"
        ) from error
    if list(container._modules) != [str(index) for index in range(len(container._modules))]:
        raise ValueError(
            f"{family.blocks!r} is no list of blocks: its children are {list(container._modules)}"
        )
    place: dict[int, str] = {}
    for name, block in container._modules.items():
        if id(block) in place:
            raise ValueError(
                f"layers {place[id(block)]} and {name} of {family.blocks!r} are one module, which "
                "cannot be grown as two layers: put a copy.deepcopy of it in one place, or share its "
                "tensors alone"
            )
        place[id(block)] = name
    return container


def make_blocks(
    model: nn.Module, family: Family, plan: GrowthPlan, tensors: Mapping[str, Tensor]
) -> dict[int, nn.Module]:
    """New blocks by their index in the grown model: their source's module around the migrated `tensors`.

    A new block has its source's classes, settings, mode and `requires_grad`. What the source shares with the
    rest of the model (the configuration, a tied tensor, a common submodule) the new block shares too. The
    user's hooks that run with the forward or backward pass stay where they were registered; so does compiled
    code. The hooks by which transformers collects hidden states, attentions and router logits are copied: it
    registers them once, at the first forward pass that needs them, and would pass new blocks over.

    Raises
    ------
    ValueError
        If the source cannot be copied faithfully.
    """
    blocks = list(block_list(model, family).children())
    shared = _shared(model, family)
    suffixes = block_tensors(tensors, family)
    made: dict[int, nn.Module] = {}
    for layer in plan.new_layers:
        source = blocks[plan.layers[layer].source]
        _check_copyable(source, plan.layers[layer].source)
        own = {suffix: tensors[name] for suffix, name in suffixes[layer].items()}
        made[layer] = _copy_block(source, own, shared)
    return made


def _copy_block(source: nn.Module, tensors: Mapping[str, Tensor], shared: dict[int, Any]) -> nn.Module:
    memo: dict[int, Any] = {id(value): value for value in _belongings(source) if id(value) in shared}
    for suffix, parameter in source.named_parameters():
        memo[id(parameter)] = _new_parameter(suffix, parameter, tensors, tied=id(parameter) in shared)
    for suffix, buffer in source.named_buffers():
        if suffix in tensors and id(buffer) not in shared:
            memo[id(buffer)] = tensors[suffix]
    for module in source.modules():
        for name in _RUNTIME_HOOKS:
            hooks = getattr(module, name)
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_capture(hook))
    try:
        block = copy.deepcopy(source, memo)
    except Exception as error:
        raise ValueError(
            f"a block of class {type(source).__name__} cannot be copied ({error}): remove what was attached "
            "to it (old-style weight_norm, open files), grow, and attach it again"
        ) from error
    return block


def _new_parameter(
    suffix: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor], *, tied: bool
) -> nn.Parameter:
    if suffix not in tensors:
        raise ValueError(
            f"the model's state_dict() has no entry for {suffix!r} of its blocks: growth needs one for each "
            "parameter"
        )
    if tied:
        if not torch.equal(tensors[suffix], parameter):
            raise ValueError(
                f"{suffix!r} is one tensor for several layers, and this initialiser would change it: use "
                "init='copy'"
            )
        return parameter
    new = nn.Parameter(tensors[suffix], requires_grad=parameter.requires_grad)
    vars(new).update(vars(parameter))  # marks that optimizers read, such as "no weight decay"
    return new


def _belongings(module: nn.Module) -> Iterator[Any]:
    """Modules, parameters, buffers and other objects that are kept in a module, itself excepted."""
    for inner in module.modules():
        if inner is not module:
            yield inner
        yield from inner.parameters(recurse=False)
        yield from inner.buffers(recurse=False)
        for name, value in vars(inner).items():
            if name not in _OWN and not isinstance(value, _ATOMIC):
                yield value


def _shared(model: nn.Module, family: Family) -> dict[int, Any]:
    """Objects by id that belong to a block and to something outside of it as well."""
    blocks = list(block_list(model, family).children())
    everything: dict[int, Any] = {}
    owners: Counter[int] = Counter()
    for block in blocks:
        found = {id(value): value for value in _belongings(block)}
        everything |= found
        owners.update(found.keys())
    inside = {id(module) for block in blocks for module in block.modules()}
    for outer in model.modules():
        if id(outer) in inside:
            continue
        values = (*outer.parameters(recurse=False), *outer.buffers(recurse=False), *vars(outer).values())
        owners.update({id(value) for value in (outer, *values)} & everything.keys())
    return {key: value for key, value in everything.items() if owners[key] > 1}


def _check_copyable(source: nn.Module, layer: int) -> None:
    for name, module in source.named_modules():
        where = f"layer {layer}" + (f", {name!r}," if name else "")
        own = vars(module).get("forward")
        if own is not None and not (isinstance(own, MethodType) and own.__self__ is module):
            raise ValueError(
                f"{where} has a forward of its own that is no method of it, so a copy would run the source's "
                "weights: undo the patch, grow, and patch every block"
            )
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils"):
                raise ValueError(
                    f"{where} computes its weight in a hook ({type(hook).__name__}): use "
                    "torch.nn.utils.parametrizations instead"
                )


def count_hooks(module: nn.Module) -> int:
    """Forward and backward hooks that are registered in a block, those that a copy gets excepted."""
    return sum(
        not _is_capture(hook)
        for inner in module.modules()
        for name in _HOOKS
        for hook in getattr(inner, name).values()
    )


def _is_capture(hook: object) -> bool:
    """Whether transformers registered this hook to collect outputs. It knows nothing of its module."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def compile_likewise(
    made: Mapping[int, nn.Module],
    sources: Mapping[int, nn.Module],
    compile_block: Callable[[nn.Module], object],
) -> int:
    """Compile in new blocks what is compiled in their sources; a copy starts without compiled code.

    Returns
    -------
    The number of modules that were compiled.
    """
    compiled = [
        new
        for layer, block in made.items()
        for new, old in zip(block.modules(), sources[layer].modules(), strict=True)
        if old._compiled_call_impl is not None and new is not old
    ]
    for module in compiled:
        compile_block(module)
    return len(compiled)


def install_blocks(undo: ExitStack, container: nn.Module, blocks: list[nn.Module]) -> None:
    """Put `blocks` into the container, in that order, and tell each its place."""
    before = dict(container._modules)
    offsets = _index_offsets(container)

    def restore() -> None:
        container._modules.clear()
        container._modules.update(before)

    undo.callback(restore)
    container._modules.clear()
    container._modules.update({str(index): block for index, block in enumerate(blocks)})
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name in vars(module).keys() & {name for where, name in offsets if where == path}:
                old, new = getattr(module, name), index + offsets[path, name]
                if old is not None and old != new:
                    undo.callback(setattr, module, name, old)
                    setattr(module, name, new)


def _index_offsets(container: nn.Module) -> dict[tuple[str, str], int]:
    """Where blocks keep their own index, and what is added to it there, by (path in the block, attribute)."""
    found: dict[tuple[str, str], int] = {}
    blocks = list(container.children())
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            if vars(module).get(_LAYER_INDEX) == index:  # also where only some blocks have it
                found[path, _LAYER_INDEX] = 0
    assert isinstance(container, nn.ModuleList | nn.Sequential)
    for path, name in index_attributes(container):
        index, held = next((i, vars(m)[name]) for i, m in _modules_at(blocks, path) if name in vars(m))
        found[path, name] = held - index
    return found


def _modules_at(blocks: list[nn.Module], path: str) -> Iterator[tuple[int, nn.Module]]:
    """The submodule at a path, of each block that has it, with the block's number."""
    for index, block in enumerate(blocks):
        for where, module in block.named_modules():
            if where == path:
                yield index, module


def install_config(undo: ExitStack, config: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Set what differs between the configuration dicts, in the live object and its nested ones."""
    saved = dict(vars(config))

    def restore() -> None:
        vars(config).clear()
        vars(config).update(saved)

    undo.callback(restore)
    for key, value in after.items():
        if before.get(key) == value:
            continue
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            install_config(undo, inner, before[key], value)
        else:
            setattr(config, key, value)
