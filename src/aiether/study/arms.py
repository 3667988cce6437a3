"""From a specification to runs: the configuration of every arm, and the cells that a study consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aiether.training.config import TrainConfig, merge

from .spec import StudySpec

BUDGETS = {"steps": "max_steps", "tokens": "max_tokens", "flops": "max_flops", "seconds": "max_seconds"}
OWNED: Mapping[str, str] = {
    "seed": "seeds",
    "output_dir": "the study's folder",
    "eval_batches": "eval_windows",
    "baseline": "baseline",
    "num_epochs": "budget",
    "report_to": "the report",
    **dict.fromkeys(BUDGETS.values(), "budget"),
}
"""Settings that a study gives, and which of its own keys they come from."""

_ONE_FOR_ALL = (
    "dataset_path",
    "dataset_weights",
    "text_column",
    "token_dtype",
    "validation_fraction",
    "tokenizer",
    "vocab_size",
    "context_length",
)
"""Under another vocabulary or context the same number of windows covers another part of the text."""


@dataclass(frozen=True)
class Cell:
    """One run of a study: a condition at a length of the budget, a learning rate and a seed."""

    condition: str
    length: float
    seed: int
    lr: float | None = None
    tuning: bool = False

    @property
    def folder(self) -> str:
        """Its run folder below the study's."""
        rate = "" if self.lr is None else f"-lr{self.lr:.12g}"
        return f"cells/{self.condition}/{self.length:.12g}{rate}-seed{self.seed}"


def tuning_cells(spec: StudySpec) -> tuple[Cell, ...]:
    """The runs that choose each condition's learning rate."""
    if spec.tuning is None:
        return ()
    return tuple(
        Cell(name, 1.0, spec.tuning.seed, lr, tuning=True)
        for name in spec.all_conditions()
        for lr in spec.tuning.lr
    )


def cells(spec: StudySpec, chosen: Mapping[str, float]) -> tuple[Cell, ...]:
    """The runs that count, seed by seed; `chosen` holds each condition's tuned learning rate, if any."""
    return tuple(
        Cell(name, length, seed, chosen.get(name))
        for seed in spec.seeds
        for name in spec.all_conditions()
        for length in lengths_of(spec, name)
    )


def lengths_of(spec: StudySpec, condition: str) -> tuple[float, ...]:
    """The multiples of the budget at which a condition is run."""
    return tuple(sorted(spec.lengths)) if condition in spec.baselines() else (1.0,)


def settings_of(spec: StudySpec, condition: str) -> dict[str, Any]:
    """Base and condition together, as `aiether train` would read them."""
    return {**spec.base, **spec.all_conditions()[condition].settings}


def cell_config(spec: StudySpec, cell: Cell) -> TrainConfig:
    """The configuration of one run, its output folder left open.

    Raises
    ------
    ValueError
        Naming the condition, for a setting that is unknown, of the wrong type, the study's own, or that
        cannot work.
    """
    settings = settings_of(spec, cell.condition)
    try:
        for name in settings:
            own = OWNED.get(name.replace("-", "_"))
            if own is not None:
                raise ValueError(f"{name} comes from {own} in a study; remove it from the settings")
        amount = spec.budget * cell.length
        given: dict[str, Any] = {
            BUDGETS[spec.budget_unit]: _whole(spec.budget_unit, amount),
            "seed": cell.seed,
        }
        if cell.lr is not None:
            given["lr"] = cell.lr
        config = merge(None, settings, given)
        given["eval_batches"] = _eval_batches(spec.eval_windows, config.batch_size)
        config = merge(None, settings, given)
        config.validate()
    except ValueError as error:
        raise ValueError(f"condition {cell.condition}: {error}") from error
    return config


def retrofit_of(spec: StudySpec, condition: str) -> dict[str, Any] | None:
    """What a condition does to the study's model; None for a study that trains each run from the start."""
    if spec.retrofit is None:
        return None
    return {**spec.retrofit, **spec.all_conditions()[condition].retrofit}


def pretrain_config(spec: StudySpec) -> TrainConfig:
    """The configuration of the model that a study of retrofitted models begins with.

    Raises
    ------
    ValueError
        For a setting that is unknown, of the wrong type, or that cannot work.
    """
    assert spec.pretrain is not None
    try:
        config = merge(None, {"trigger": "never", **spec.base, **spec.pretrain}, {"seed": 0})
        config.validate()
    except ValueError as error:
        raise ValueError(f"pretrain: {error}") from error
    return config


def _whole(unit: str, amount: float) -> int | float:
    return max(1, round(amount)) if unit in ("steps", "tokens") else amount


def _eval_batches(windows: int, batch_size: int) -> int:
    if windows % batch_size:
        raise ValueError(
            f"eval_windows {windows} is no multiple of batch_size {batch_size}: every arm is evaluated on "
            "the same windows, in whole batches; choose one that is"
        )
    return windows // batch_size


def check_alike(spec: StudySpec, configs: Mapping[str, TrainConfig]) -> None:
    """Raise ValueError unless the conditions differ, and differ in nothing that voids the comparison."""
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        for setting in _ONE_FOR_ALL:
            if getattr(config, setting) != getattr(first, setting):
                raise ValueError(
                    f"{setting} is {getattr(first, setting)!r} in {first_name} and "
                    f"{getattr(config, setting)!r} in {name}: losses on other text or other tokens do not "
                    "compare"
                )
    if spec.allow_identical_arms:
        return
    seen: dict[str, str] = {}
    for name, config in configs.items():
        key = repr({k: v for k, v in asdict(config).items() if k != "preset"})
        key += repr(retrofit_of(spec, name))
        if key in seen:
            raise ValueError(
                f"conditions {seen[key]} and {name} do not differ in any setting: change one of them, remove "
                "it, or say allow_identical_arms: true to see what the method alone adds"
            )
        seen[key] = name
