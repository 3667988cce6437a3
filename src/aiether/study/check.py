"""A whole study looked at before anything runs: do its arms work, differ, and hold what they claim?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from aiether.data import PackedData
from aiether.evaluation import flops_per_token, measure_flops_per_token
from aiether.growth.blank import without_weights
from aiether.retrofitting.arm_settings import arm_settings, tuning_of
from aiether.retrofitting.arm_text import text_of, windows_of
from aiether.training.arms import model_settings, tokens_per_step, windows
from aiether.training.config import TrainConfig
from aiether.training.length import course_of
from aiether.training.model import Architecture, undrawn_model

from .arms import Cell, cell_config, cells, check_alike, pretrain_config, retrofit_of, tuning_cells
from .spec import Claims, StudySpec, check_form
from .statistics import seeds_needed, smallest_p

_Texts = dict[str | tuple[str, ...] | None, PackedData]
"""What is tuned on, by its `dataset_path`; the study's own text is that of None."""


@dataclass(frozen=True)
class Shape:
    """What a model is, whatever its numbers: at the start of a run and at the depth planned for its end."""

    depth: int
    parameters: int
    flops_per_token: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """A condition as it will run at the study's budget."""

    condition: str
    config: TrainConfig
    shapes: tuple[Shape, ...]  # by depth, the first one first
    tuned_on: str | None = None  # the fingerprint of a text of its own

    @property
    def start(self) -> Shape:
        """The model at the start."""
        return self.shapes[0]

    @property
    def end(self) -> Shape:
        """The model at the depth that is planned for the end."""
        return self.shapes[-1]

    def facts(self) -> dict[str, Any]:
        """What is kept of the arm's models, for results.json."""
        by_depth = {
            str(shape.depth): {"parameters": shape.parameters, "flops_per_token": shape.flops_per_token}
            for shape in self.shapes
        }
        return {"start_depth": self.start.depth, "planned_depth": self.end.depth, "by_depth": by_depth}


def check_spec(spec: StudySpec) -> dict[str, TrainConfig]:
    """The configuration of every condition, once the specification is known to make sense; no data is read.

    Raises
    ------
    ValueError
        For the first thing that is wrong, saying what to change.
    """
    check_form(spec)
    configs = {}
    for name in spec.all_conditions():
        configs[name] = cell_config(spec, Cell(name, 1.0, spec.seeds[0]))
    every = (*tuning_cells(spec), *cells(spec, {}))
    for cell in every:
        cell_config(spec, cell)
    if len({cell.folder for cell in every}) < len(every):
        raise ValueError("two lengths or learning rates are the same to twelve digits: keep one of them")
    check_alike(spec, configs)
    _check_retrofits(spec, configs)
    _check_seeds(spec)
    return configs


def _check_retrofits(spec: StudySpec, configs: Mapping[str, TrainConfig]) -> None:
    """Conversions are looked at before a model is trained for them."""
    if spec.retrofit is None:
        return
    pretrain = pretrain_config(spec)
    for name, config in configs.items():
        try:
            arm = arm_settings(retrofit_of(spec, name) or {})
            tuning_of(arm, config)
            arm.settings.check_head(pretrain.n_embd // pretrain.n_head)
            arm.check_layers(pretrain.n_layer)
            for setting in ("arch", "n_layer", "n_head", "n_embd", "context_length", "vocab_size"):
                if getattr(config, setting) != getattr(pretrain, setting):
                    raise ValueError(f"{setting} is not the pretrained model's: leave it to base")
        except (TypeError, ValueError) as error:
            raise ValueError(f"condition {name}: {error}") from error


def _check_seeds(spec: StudySpec) -> None:
    planned, n = max(len(spec.planned()), 2 ** len(spec.factors) - 1), len(spec.seeds)
    if planned and n < 2:
        raise ValueError(
            "seeds: one seed tests nothing; give at least 2, better 5, or comparisons: [] for no test"
        )
    if planned and spec.test == "sign_flip":
        needed = seeds_needed(spec.alpha, planned)
        if n < needed:
            raise ValueError(
                f"seeds: a sign-flip test over {n} seeds can never give p below {smallest_p(n):.3g}; with "
                f"{planned} planned comparison(s) at level {spec.alpha:g} it takes {needed} seeds; raise "
                "seeds, plan fewer comparisons or choose test: t"
            )


def check_arms(spec: StudySpec, configs: Mapping[str, TrainConfig], data: PackedData) -> dict[str, Arm]:
    """Every condition with its models' sizes and costs, once its claims are known to hold.

    Raises
    ------
    ValueError
        For a claim that does not hold, or data with fewer validation windows than the study evaluates on.
    """
    arms: dict[str, Arm] = {}
    texts: _Texts = {None: data}
    for name, config in configs.items():
        _, validation = windows(config, data, max_steps=1)
        if len(validation) < spec.eval_windows:
            raise ValueError(
                f"eval_windows is {spec.eval_windows}, the validation text holds {len(validation)}: lower "
                "it, or raise validation_fraction"
            )
        if spec.metric == "bits_per_byte" and data.bytes_per_token is None:
            raise ValueError(
                "metric is bits_per_byte, and how many bytes the tokens stand for is not known: give text, "
                "or the tokens' tokenizer, or take metric: eval_loss"
            )
        models = _with_torus(spec, name, config, shapes(config, data.vocab_size))
        arms[name] = Arm(name, config, models, _own_text(spec, name, config, texts))
    for name, arm in arms.items():
        check_claims(name, spec.all_conditions()[name].claims, arm, arms)
    return arms


def _own_text(spec: StudySpec, condition: str, config: TrainConfig, texts: _Texts) -> str | None:
    """The fingerprint of what a conversion is tuned on, if that is another text than the study's.

    Args:
        texts: those that were read, each once; it is added where it is not among them.

    Raises
    ------
    ValueError
        For a text that cannot be used or is too short.
    """
    if (given := retrofit_of(spec, condition)) is None:
        return None
    arm = arm_settings(given)
    try:
        if arm.dataset_path not in texts:
            texts[arm.dataset_path] = text_of(arm, config, texts[None])
        text = texts[arm.dataset_path]
        windows_of(arm, config, text)
    except ValueError as error:
        raise ValueError(f"condition {condition}: {error}") from error
    return None if arm.dataset_path is None else text.fingerprint


def _with_torus(
    spec: StudySpec, condition: str, config: TrainConfig, models: tuple[Shape, ...]
) -> tuple[Shape, ...]:
    """The models of an arm, with what a conversion adds to a token's FLOPs."""
    given = retrofit_of(spec, condition)
    if given is None:
        return models
    added = arm_settings(given).flops_per_token(config)
    return tuple(replace(each, flops_per_token=each.flops_per_token + added) for each in models)


def shapes(config: TrainConfig, vocab_size: int) -> tuple[Shape, ...]:
    """A run's model at every depth that it can have."""
    return tuple(_shape(config, depth, vocab_size) for depth in course_of(config).depths)


def _shape(config: TrainConfig, depth: int, vocab_size: int) -> Shape:
    settings = model_settings(config, depth, vocab_size, None)
    return _counted(config.arch, tuple(settings.items()), config.batch_size)


@cache  # many conditions share a shape, and counting runs the model, if without numbers
def _counted(arch: Architecture, settings: tuple[tuple[str, Any], ...], batch_size: int) -> Shape:
    given = dict(settings)
    with without_weights():
        model = undrawn_model(arch, **given)
    cost = flops_per_token(model.config, given["context_length"], batch_size)
    counted = measure_flops_per_token(model, given["context_length"], batch_size)
    assert cost == counted, f"closed form {cost}, counted {counted} FLOPs a token in {given}"
    names = tuple(name for name, _ in model.named_parameters())
    return Shape(given["n_layer"], parameters_of(model), cost, names)


def parameters_of(model: PreTrainedModel) -> int:
    """Stored numbers; a matrix that is both embedding and output head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_claims(name: str, claims: Claims, arm: Arm, arms: Mapping[str, Arm]) -> None:
    """Raise ValueError unless a condition's models are what it says of them."""
    end = arm.end
    found: list[tuple[str, Any, Any]] = []
    if claims.final_depth is not None:
        found.append(("final_depth", claims.final_depth, end.depth))
    if claims.parameters is not None:
        found.append(("parameters", claims.parameters, end.parameters))
    if claims.same_parameters_as is not None:
        other = claims.same_parameters_as
        found.append((f"same_parameters_as {other}", arms[other].end.parameters, end.parameters))
    if claims.same_flops_as is not None:
        other = claims.same_flops_as
        found.append((f"same_flops_as {other}", arms[other].end.flops_per_token, end.flops_per_token))
    for claim, claimed, actual in found:
        if claimed != actual:
            raise ValueError(
                f"condition {name} claims {claim} ({claimed:,}) and ends with {actual:,}: change its "
                "settings or its claim"
            )
    tensors = {*arm.start.tensors, *end.tensors}
    for part in claims.absent:
        if present := sorted(tensor for tensor in tensors if part in tensor):
            raise ValueError(f"condition {name} claims to have no {part!r} and has {present[0]}")
    for part in claims.present:
        if not any(part in tensor for tensor in tensors):
            raise ValueError(f"condition {name} claims to have {part!r}: no tensor's name holds it")


def planned_flops(spec: StudySpec, arms: Mapping[str, Arm], cell: Cell) -> float | None:
    """Training FLOPs of a cell as far as they are known beforehand; None under a budget of seconds.

    A model that grows when its data say so counts as if it had its final depth from the start.
    """
    arm = arms[cell.condition]
    amount = spec.budget * cell.length
    if spec.budget_unit == "seconds":
        return None
    if spec.budget_unit == "flops":
        return amount
    config = arm.config
    per_step = tokens_per_step(config)
    steps = max(1, int(amount // per_step if spec.budget_unit == "tokens" else amount))
    course = course_of(config)
    if not course.is_known:
        return float(steps * per_step * arm.end.flops_per_token)
    costs = {shape.depth: per_step * shape.flops_per_token for shape in arm.shapes}
    return float(course.cost(steps, costs))
