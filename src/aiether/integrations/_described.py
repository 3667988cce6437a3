"""Is a model all of what its configuration describes? Growth and resuming build it anew from that."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig, PreTrainedModel

from aiether.growth import Family
from aiether.growth.blank import without_weights

from ._refuse import is_compiled_function

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_LIBRARIES = ("transformers.", "aiether.")  # they register theirs again on a model that is built anew


def fresh_model(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A model of the same class as it is when it is built, without data (meta device).

    `config`: another configuration than the model's own.
    """
    with without_weights():
        return type(model)(copy.deepcopy(model.config if config is None else config))


def check_described(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the first difference, if the configuration describes another model.

    Compared are the modules' classes, the names and shapes of parameters and persistent buffers, and which
    names are one tensor.
    """
    try:
        fresh = fresh_model(model)
    except Exception as error:
        raise ValueError(
            f"no {type(model).__name__} can be built from the model's configuration "
            f"({' '.join(str(error).split())[:200]}), which every growth and every resume has to: make its "
            "class take the configuration alone"
        ) from error
    found = _class_difference(model, fresh) or _tensor_difference(model, fresh)
    if found is not None:
        raise ValueError(
            f"the model is not the one that its configuration describes: {found}. Every growth and every "
            "resume builds the model anew from its configuration, and would lose that: put it into the "
            "configuration or into a model class of your own (merge an adapter into the weights first), or "
            "grow this model in place in a loop of your own with aiether.grow"
        )
    if tied := _tie_difference(model, fresh):
        raise ValueError(
            f"{tied}: every growth and every resume builds the model anew from its configuration; set "
            "config.tie_word_embeddings to what the model does"
        )


def _class_difference(model: nn.Module, fresh: nn.Module) -> str | None:
    live = dict(model.named_modules(remove_duplicate=False))
    expected = dict(fresh.named_modules(remove_duplicate=False))
    for path in live | expected:
        own, built = (_class_of(m[path]) if path in m else None for m in (live, expected))
        if own is not built:
            is_now, would_be = (cls.__name__ if cls else "missing" for cls in (own, built))
            return f"{path!r} is {is_now}, and {would_be} in a model that is built from it"
    return None


def _class_of(module: nn.Module) -> type[nn.Module]:
    """torch makes a class for each parametrised module; its parametrisations are modules of their own."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _tensor_difference(model: nn.Module, fresh: nn.Module) -> str | None:
    live, expected = (_shapes(own.state_dict()) for own in (model, fresh))
    for name in live | expected:
        is_now, would_be = (shapes.get(name, "missing") for shapes in (live, expected))
        if is_now != would_be:
            return f"tensor {name!r} is {is_now}, and {would_be} in a model that is built from it"
    return None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tie_difference(model: nn.Module, fresh: nn.Module) -> str | None:
    live, expected = _first_names(model), _first_names(fresh)
    for name, first in live.items():
        if expected[name] != first:
            other = first if first != name else expected[name]
            one = "one tensor here, and two" if first != name else "two tensors here, and one"
            return f"{other!r} and {name!r} are {one} in a model that is built from the configuration"
    return None


def _first_names(model: nn.Module) -> dict[str, str]:
    """By name of a parameter the first of the names that it has."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def check_nothing_attached(model: PreTrainedModel, family: Family, *, compiled: bool) -> None:
    """Raise ValueError for what was attached to modules, which a model that is built anew would not have.

    Hooks, methods put in the place of `forward`, and compiled code; `compiled`: the blocks will be compiled
    in any case.
    """
    for path, module in model.named_modules():
        where = repr(path) if path else "the model"
        for kind in _users_hooks(module):
            raise ValueError(
                f"{where} has a {kind} that you registered: every growth and every resume builds the model "
                "anew, without it. Remove it, and register it on each stage's model instead (an observer's "
                "on_stage(stage=, step=, model=, lineage=)), or grow in place with aiether.grow"
            )
        if _is_compiled(module) and not (compiled and _is_block(path, family)):
            raise ValueError(
                f"{where} is compiled, and every growth and every resume builds the model anew, where it "
                "would not be: leave it uncompiled and call fit(trainer, compile=True), which compiles the "
                "blocks of every stage"
            )
        if _has_own_forward(module):
            raise ValueError(
                f"{where} has a forward put in the place of its class's: every growth and every resume "
                "builds the model anew, without it. Put it into a model class of your own"
            )


def _users_hooks(module: nn.Module) -> Iterator[str]:
    for attribute, kind in _HOOKS.items():
        if not all(_is_librarys(hook) for hook in getattr(module, attribute).values()):
            yield kind
    for name, parameter in module.named_parameters(recurse=False):
        of_gradient = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if any(of_gradient):
            yield f"gradient hook on its {name!r}"


def _is_librarys(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(function, "__module__", "")).startswith(_LIBRARIES)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or is_compiled_function(vars(module).get("forward"))


def _is_block(path: str, family: Family) -> bool:
    parent, _, index = path.rpartition(".")
    return parent == family.blocks and index.isdigit()


def _has_own_forward(module: nn.Module) -> bool:
    """Accelerate's (mixed precision) is none: it keeps what it stands for, and comes back by itself."""
    own = vars(module).get("_original_forward", vars(module).get("forward"))
    if own is None:
        return False
    of_class = isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward
    return not of_class
