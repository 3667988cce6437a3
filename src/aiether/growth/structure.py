"""The structure of a model: where its blocks are, what its configuration says about each, what silences them.

Everything is read from a copy on the meta device (shapes without data), so the largest model costs no memory,
no hook of the user's runs and no random number is drawn.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .blank import without_weights
from .identity import BlockIdentity, OperationRecorder, read_identity

_NAME_IT = 'name the list that shall grow: aiether.family_of(model, blocks="{}")'


def module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Outermost module lists with parameters whose entries are of one class, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        if len({type(block) for block in module}) == 1 and any(True for _ in module.parameters()):
            found[path] = module
    return found


def find_blocks(model: nn.Module, depth: int | None) -> str:
    """The path of the list of blocks: the only list of blocks there is, or the only one of `depth` entries.

    Raises
    ------
    ValueError
        If there is none, or more than one.
    """
    lists = module_lists(model)
    fitting = [path for path, blocks in lists.items() if len(blocks) == depth] or list(lists)
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} lists of blocks ({', '.join(fitting)})" if fitting else "no list of equal blocks"
    hint = _NAME_IT.format(fitting[0] if fitting else "encoder.layers")
    raise ValueError(f"{type(model).__name__} has {what}: {hint}")


def blocks_at(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    """The list of blocks at a path that the user named.

    Raises
    ------
    ValueError
        If there is no list at `path`.
    """
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks):
        return blocks
    lists = ", ".join(module_lists(model)) or "none"
    raise ValueError(f"{type(model).__name__} has no list of blocks at {path!r} (there are: {lists})")


def blocks_in_names(names: Iterable[str]) -> str | None:
    """The numbered prefix of a state dict's names: `model.layers` where `model.layers.0.`, `.1.` ... are.

    The first number in a name counts, so that the experts inside a block are not taken for blocks. None when
    no prefix, or more than one, has the numbers from 0 without a gap.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"(.*?)\.(\d+)\.", name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    fitting = [prefix for prefix, found in numbers.items() if found == set(range(len(found)))]
    return fitting[0] if len(fitting) == 1 else None


def examine(model: nn.Module, path: str) -> BlockIdentity:
    """What makes the blocks at `path` the identity; the model itself is neither run nor changed.

    The whole model is run on the meta device where it is one of transformers', so that its blocks get the
    arguments which they need; else a block alone, on hidden states.
    """
    try:
        if hasattr(model, "main_input_name"):
            shadow = meta_copy(model)
            read = _read_in_model(shadow, _representatives(blocks_at(shadow, path)))
        else:
            read = _read_alone([meta_copy(block) for block in _representatives(blocks_at(model, path))])
    except Exception as error:  # noqa: BLE001 - any model's code runs here; what it raises becomes the reason
        return BlockIdentity({}, (), (), f"a trial run without data failed ({_line(error)})")
    return _merged(read)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _merged(found: list[BlockIdentity]) -> BlockIdentity:
    """Blocks of several kinds (dense and mixture-of-experts) in one list."""
    values: dict[str, float] = {}
    for one in found:
        if any(values.get(suffix, value) != value for suffix, value in one.values.items()):
            return BlockIdentity({}, (), (), "its layers need different values in one tensor")
        values |= one.values
    return BlockIdentity(
        values,
        tuple(dict.fromkeys(name for one in found for name in one.projections)),
        tuple(dict.fromkeys(name for one in found for name in one.unit_offset)),
        next((one.obstacle for one in found if one.obstacle), None),
    )


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors hold no data, in evaluation mode, without hooks or replaced `forward` methods."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        module.__dict__.pop("forward", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    return shadow.eval()


def _representatives(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The first block of each kind: of each class with the same tensors."""
    kinds: dict[Any, nn.Module] = {}
    for block in blocks:
        kinds.setdefault((type(block), frozenset(block.state_dict())), block)
    return list(kinds.values())


class _Enough(Exception):
    """The last block of interest has been seen."""


def _read_in_model(model: nn.Module, blocks: list[nn.Module]) -> list[BlockIdentity]:
    config: Any = getattr(model, "config")  # noqa: B009 - nn.Module has no `config`
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"  # the one without a loop over the experts that were hit
    config.use_cache = False
    recorder, found = OperationRecorder(), []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _name_tensors(recorder, block, args[0] if args else kwargs["hidden_states"])

    def after(block: nn.Module, args: Any, output: Any) -> None:
        found.append(read_identity(recorder, _hidden_states(output)))
        if block is blocks[-1]:
            raise _Enough

    for block in blocks:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
    with torch.no_grad(), torch.device("meta"), recorder:
        try:
            model(**_inputs(model, config))
        except _Enough:
            return found
    raise RuntimeError("the forward pass leaves blocks out")


def _inputs(model: Any, config: Any) -> dict[str, Tensor]:
    name = model.main_input_name
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    return {name: torch.zeros(1, 4, dtype=torch.long)}


def _read_alone(blocks: list[nn.Module]) -> list[BlockIdentity]:
    """Blocks that take hidden states alone, as wide as their first norm, or else their first matrix, is."""
    found = []
    for block in blocks:
        recorder = OperationRecorder()
        with torch.no_grad(), torch.device("meta"), recorder:
            hidden = torch.zeros(1, 4, _width(block))
            _name_tensors(recorder, block, hidden)
            found.append(read_identity(recorder, _hidden_states(block(hidden))))
    return found


def _width(block: nn.Module) -> int:
    for module in block.modules():
        scale = next(module.parameters(recurse=False), None)
        if scale is not None and "norm" in type(module).__name__.lower():
            return scale.shape[-1]
    return next(p.shape[1] for p in block.parameters() if p.ndim > 1)


def _name_tensors(recorder: OperationRecorder, block: nn.Module, hidden: Tensor) -> None:
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        recorder.name(tensor, "parameter", name)
    recorder.name(hidden, "input")


def _hidden_states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


# Configurations


def depth_key_of(config: Any, depth: int | None = None) -> str | None:
    """The configuration's name for the number of layers; the one with the value `depth` where given."""
    mapped = getattr(type(config), "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    values = settings_of(config)
    if mapped in values and depth in (None, values[mapped]):
        return mapped
    fitting = [k for k, v in values.items() if "layer" in k and isinstance(v, int) and v == depth]
    return fitting[0] if len(fitting) == 1 else None


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration as a dict: transformers', a dict, or any object with attributes."""
    if isinstance(config, Mapping):
        return dict(config)
    return config.to_dict() if hasattr(config, "to_dict") else dict(getattr(config, "__dict__", {}))


def per_layer_keys(config: Any, depth_key: str) -> tuple[str, ...]:
    """Names of the lists with one entry a layer.

    Two sources: lists of the class's own defaults that get longer with the depth, and lists of this
    configuration with as many entries as layers and `layer` in their name. Lists that enumerate layers
    (rising indices, as `mlp_only_layers`) are none.
    """
    values = settings_of(config)
    depth = values.get(depth_key)
    own = {
        key
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and "layer" in key
    }
    follow, enumerate_layers = _lists_of_class(type(config), depth_key)
    numbered = {key for key in own if all(isinstance(v, int) for v in values[key])} - follow
    rising = {key for key in numbered if sorted(set(values[key])) == list(values[key])}
    return tuple(sorted((own | follow) - enumerate_layers - rising))


def _default_lists(config_class: type, depth_key: str, depth: int) -> dict[str, list[Any]]:
    if not hasattr(config_class, "to_dict"):
        return {}
    try:
        with _quietly():
            values = config_class(**{depth_key: depth}).to_dict()
    except Exception:  # noqa: BLE001 - a class may refuse depths that its other defaults do not fit
        return {}
    return {key: list(value) for key, value in values.items() if isinstance(value, (list, tuple))}


def _lists_of_class(config_class: type, depth_key: str) -> tuple[set[str], set[str]]:
    """Names of default lists that have one entry a layer, and of those among them that number the layers."""
    lists = {depth: _default_lists(config_class, depth_key, depth) for depth in (5, 7)}
    follow = {key for key in lists[5] if len(lists[5][key]) == 5 and len(lists[7].get(key, ())) == 7}
    return follow, {key for key in follow if lists[7][key] == list(range(7))}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' remarks on a configuration that nobody is going to use."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def model_of(config: Any) -> nn.Module:
    """A model on the meta device, from a configuration, a configuration dict or a `model_type`.

    The class is the first of `architectures` that transformers has, else the causal language model of the
    type, else its bare model.

    Raises
    ------
    ValueError
        If transformers does not know the type, or cannot build the model.
    """
    import transformers  # heavy, and needed only where no model is at hand

    config = copy.deepcopy(as_config(config))
    named = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    # The names come from a file: nothing but a model's class may be called.
    classes = [c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]
    try:
        with _quietly(), without_weights():
            if classes:
                return classes[0](config)
            if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                return transformers.AutoModelForCausalLM.from_config(config)
            return transformers.AutoModel.from_config(config)
    except Exception as error:
        raise ValueError(
            f"transformers cannot build a model of type {config.model_type!r} from this configuration "
            f"({_line(error)}): check it, or give the model itself"
        ) from error


def as_config(config: Any) -> Any:
    """transformers' configuration object for an object, a dict or a `model_type`.

    Raises
    ------
    ValueError
        If transformers does not know the type, or refuses the settings.
    """
    if hasattr(config, "to_dict"):
        return config
    import transformers

    settings = {"model_type": config} if isinstance(config, str) else settings_of(config)
    model_type = str(settings.pop("model_type", None))
    if model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model type {model_type!r}: give the model itself and "
            f"{_NAME_IT.format('encoder.layers')}, or register the type in aiether.growth.FAMILIES"
        )
    try:
        with _quietly():
            return transformers.AutoConfig.for_model(model_type, **settings)
    except Exception as error:
        raise ValueError(f"transformers refuses the {model_type} configuration: {_line(error)}") from error


def written_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration dict with everything that transformers derives from it; itself for an unknown type."""
    import transformers

    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        return dict(config)
    return as_config(dict(config)).to_dict()
