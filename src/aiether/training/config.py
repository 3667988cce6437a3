"""Everything that a run can be told, the named presets, and how preset, file and flags become one config."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

import yaml

from aiether.adaptive.settings import SIZES, LahrSettings
from aiether.data import DataConfig
from aiether.growth import GROWTH_PRESETS, GrowthConfig, planned_depth

from .coerce import coerce, unknown
from .settings_file import read_settings_file

DEFAULT_PRESET = "recommended"
"""The preset of `aiether train`; `scripts/train.py` starts from `report`."""

_AT_LEAST_ONE = (
    "n_layer",
    "n_head",
    "n_embd",
    "context_length",
    "max_steps",
    "max_tokens",
    "batch_size",
    "gradient_accumulation_steps",
    "eval_interval_steps",
    "eval_batches",
    "log_interval_steps",
    "save_interval_steps",
    "keep_checkpoints",
)
_POSITIVE = ("num_epochs", "max_flops", "max_seconds", "lr", "max_grad_norm")
_NOT_NEGATIVE = ("lr_warmup_steps", "weight_decay", "seed", "max_skipped_steps")
_BELOW_ONE = ("dropout", "adam_beta1", "adam_beta2")
_AT_MOST: dict[str, float] = {
    **dict.fromkeys(("n_layer", "max_layers", "n_head"), 10_000),
    **dict.fromkeys(("n_embd", "context_length", "vocab_size"), 10_000_000),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps"), 65_536),
    **dict.fromkeys(("history_window_size", "k_subspace", "ell_orth", "eval_batches"), 1_000_000),
    **dict.fromkeys(("keep_checkpoints", "max_skipped_steps", "pg_patience", "grow_by"), 1_000_000),
    **dict.fromkeys(("max_steps", "warmup_steps", "lr_warmup_steps", "isolated_warmup_steps"), 10**9),
    **dict.fromkeys(("eval_interval_steps", "log_interval_steps", "save_interval_steps"), 10**9),
    **dict.fromkeys(
        ("collect_interval_steps", "unfreeze_interval_steps", "lag_steps", "lag_interval"), 10**9
    ),
    **dict.fromkeys(("lr", "weight_decay", "noise", "beta0", "gamma0", "eta0", "isolated_lr_scale"), 1e3),
    **dict.fromkeys(("lahr_every", "lahr_burst", "lahr_memory_keys", "lahr_memory_top_k"), 100_000),
    **dict.fromkeys(("lahr_iterations", "lahr_memory_heads"), 1_000),
    **dict.fromkeys(("lahr_slack", "lahr_kl_weight", "lahr_memory_lr"), 1e3),
    "num_epochs": 1e6,
    "max_tokens": 10**18,
    "max_flops": 1e30,
    "max_seconds": 1e9,
    "max_grad_norm": 1e30,
    "seed": 2**32 - 1,
}
"""Beyond these a setting is a slip of the finger: each is far above any use, and below what overflows."""
BUDGETS = ("max_steps", "max_tokens", "max_flops", "max_seconds")
"""A run's length: at most one of these is set; with none, `num_epochs` says it."""
_PATHS = ("dataset_path", "tokenizer", "cache_dir", "output_dir")


class RangeWarning(UserWarning):
    """A value works but lies outside the range that the reference documents."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig, GrowthConfig, LahrSettings):
    """One run: its data, its model, its training and its growth, flat.

    The defaults are the `report` preset, which keeps every default that the reference documents.

    Attributes
    ----------
    preset: the name of the overrides that the configuration started from.
    arch: transformers' GPT-2, Llama or Phi, built from a configuration; or LAHR (see `LahrSettings`).
    size: a shape by name, in place of n_layer, max_layers, n_head, n_embd, context_length and trigger (never)
        where these are not given beside it.
    n_layer, n_head, n_embd: layers at the start, attention heads, width.
    context_length: tokens per training window.
    dropout: GPT-2: residual, embedding and attention; Llama: attention.
    num_epochs: passes over the training tokens, where none of the following says how long the run is.
    max_steps, max_tokens, max_flops, max_seconds: the run's length in optimizer steps, tokens, training FLOPs
        (head and attention included, see `aiether.evaluation`) or seconds of training (evaluating, saving,
        growing and compiling left out). At most one is set. The learning-rate schedule and every fraction
        are of the steps that it comes to (see `aiether.training.budget`).
    batch_size, gradient_accumulation_steps: windows per forward pass, forward passes per optimizer step.
    lr, lr_warmup_steps, schedule, decay_fraction: peak learning rate, linear warm-up, schedule, and the share
        of the steps over which `wsd` decays.
    optimizer: AdamW, or Muon on the matrices of the blocks with AdamW on the rest.
    eval_interval_steps: None: `collect_interval_steps`.
    eval_batches: validation batches per evaluation.
    save_interval_steps: None: a tenth of the run.
    on_nan: when the loss or the gradients become infinite or NaN: stop; or go back to the last checkpoint
        and on without that step's batch, for at most `max_skipped_steps` steps.
    output_dir: None: a new folder under runs/.
    baseline: `static` also trains the final depth from the start, for the FLOPs that the run took.
    sample_prompt: what the model continues at the end of each stage, for the report.
    report_to: trackers beside the run's own files; tracking_project: the project that they file it under.
    """

    preset: str = "report"
    arch: Literal["gpt2", "llama", "phi", "lahr"] = "gpt2"
    size: Literal["tiny", "small", "medium", "base"] | None = None
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    context_length: int = 256
    dropout: float = 0.1
    num_epochs: float = 3.0
    max_steps: int | None = None
    max_tokens: int | None = None
    max_flops: float | None = None
    max_seconds: float | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr: float = 5e-4
    lr_warmup_steps: int = 100
    schedule: Literal["wsd", "cosine", "linear"] = "cosine"
    decay_fraction: float = 0.2
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    bf16: bool = False
    compile: bool = False
    cuda_graphs: bool = True
    eval_interval_steps: int | None = None
    eval_batches: int = 20
    log_interval_steps: int = 10
    save_interval_steps: int | None = None
    keep_checkpoints: int = 2
    on_nan: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10
    output_dir: str | None = None
    baseline: Literal["none", "static"] = "none"
    sample_prompt: str = "def main("
    report_to: tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...] = ("none",)
    tracking_project: str = "aiether"

    def validate(self) -> None:
        """Raise ValueError for the first setting that cannot work, naming what is allowed."""
        DataConfig.validate(self)
        GrowthConfig.validate(self)
        self._validate_choices_of_training()
        self._validate_numbers()
        self._validate_length()
        self._validate_texts()
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd}, not a multiple of n_head ({self.n_head}): change one of them"
            )
        if self.arch != "gpt2" and self.n_embd // self.n_head % (4 if self.arch == "phi" else 2):
            raise ValueError(
                f"n_embd / n_head is {self.n_embd // self.n_head}: rotary positions need an even one, and "
                "Phi, which turns half of a head, a multiple of 4"
            )
        self._validate_lahr()
        planned_depth(self, self.n_layer)  # raises for a model that starts deeper than it may end

    def lahr_settings(self) -> LahrSettings | None:
        """What a LAHR model is told; None for another architecture."""
        if self.arch != "lahr":
            return None
        return LahrSettings(**{field.name: getattr(self, field.name) for field in fields(LahrSettings)})

    def _validate_lahr(self) -> None:
        if self.arch != "lahr":
            given = [f.name for f in fields(LahrSettings) if getattr(self, f.name) != f.default]
            if given:
                raise ValueError(
                    f"{given[0]} is for --arch lahr, and arch is {self.arch!r}: leave one of them out"
                )
            return
        self.validate_lahr()
        if self.parts()[0]:
            depths = {"n_layer": self.n_layer, "max_layers": self.max_layers}
            depths |= {"grow_to": next((d for d in self.grow_to if d % self.lahr_every), None)}
            for name, depth in depths.items():
                if depth is not None and depth % self.lahr_every:
                    raise ValueError(
                        f"{name} is {depth}: the last of each {self.lahr_every} layers is routed "
                        "(lahr_every), so that a model has whole groups of them and grows by whole groups"
                    )
            self._validate_lahr_placement()

    def _validate_lahr_placement(self) -> None:
        grows = self.trigger != "never" or bool(self.grow_to)
        others = [name for name, _ in self.forms() if name != "stack"]
        if grows and others and self.lahr_every > 1:
            raise ValueError(
                f"placement is {others[0]!r}: new layers would stand where the last of each "
                f"{self.lahr_every} is no longer routed (lahr_every); take placement 'stack'"
            )

    def _validate_choices_of_training(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))
        hints = setting_types()
        if self.size not in (None, *SIZES):
            raise ValueError(f"size is {self.size!r}: choose one of {', '.join(SIZES)}, or leave it out")
        if self.size is not None:
            usual = {f.name: f.default for f in fields(TrainConfig)}
            shape = {name: value for name, value in SIZES[self.size].items() if value != usual[name]}
            if all(getattr(self, name) == usual[name] for name in shape):
                given = ", ".join(f"{name}={value}" for name, value in shape.items())
                raise ValueError(
                    f"size is {self.size!r}, and every setting that it stands for is as if it were not "
                    f"given: in Python give {given} instead"
                )
        for name in ("arch", "schedule", "optimizer", "device", "baseline", "on_nan"):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose one of {', '.join(get_args(hints[name]))}"
                )

        self._validate_trackers()

    def _validate_trackers(self) -> None:
        allowed = get_args(get_args(setting_types()["report_to"])[0])
        for name in self.report_to:
            if name not in allowed:
                raise ValueError(f"report_to holds {name!r}: choose among {', '.join(allowed)}")
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"report_to is {' '.join(self.report_to)}: name each tracker once")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to is {' '.join(self.report_to)}: none cannot stand beside a tracker")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", self.tracking_project):
            raise ValueError(
                f"tracking_project is {self.tracking_project!r}: up to 128 letters, digits, '-', '_' and '.' "
                "are meant, the first a letter or digit"
            )

    def _validate_numbers(self) -> None:
        for names, allowed, holds in (
            (_AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
            (_POSITIVE, "greater than 0", lambda value: 0 < value < math.inf),
            (_NOT_NEGATIVE, "0 or greater", lambda value: 0 <= value < math.inf),
            (_BELOW_ONE, "from 0 to below 1", lambda value: 0 <= value < 1),
            (("decay_fraction",), "greater than 0 and at most 1", lambda value: 0 < value <= 1),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} is {value}: it must be {allowed}")
        for name, most in _AT_MOST.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and value > most:
                raise ValueError(f"{name} is {value}: it must be at most {most:,.10g}")

    def _validate_length(self) -> None:
        given = [f"{name} ({getattr(self, name):,g})" for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long the run is: keep one of them")

    def _validate_texts(self) -> None:
        for name in ("text_column", "sample_prompt"):
            check_text(name, getattr(self, name))
        for name in _PATHS:
            value = getattr(self, name)
            for path in value if isinstance(value, tuple) else (value,):  # several sources
                check_path(name, path)


def check_text(name: str, value: str | None) -> None:
    """Raise ValueError for what looks like text and is none: bytes of another encoding."""
    if value is not None and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is {value!r}: it holds characters that are no text") from None


def check_path(name: str, value: str | None) -> None:
    """Raise ValueError for a path that no system has: empty, with a NUL, or in an unknown home (~user)."""
    if value is None:
        return
    if not value.strip() or "\0" in value:
        raise ValueError(f"{name} is {value!r}: name a path, or leave it out")
    check_text(name, value)
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} is {value!r}: there is no such user; write the path out") from None


_RECOMMENDED: dict[str, Any] = {
    **GROWTH_PRESETS["recommended"],
    "n_layer": 2,
    "max_layers": 8,
    "n_head": 4,
    "n_embd": 128,
    "context_length": 128,
    "dropout": 0.0,
    "max_steps": 1500,
    "batch_size": 16,
    "lr": 2e-3,
    "lr_warmup_steps": 50,
    "schedule": "wsd",
    "optimizer": "muon",
    "eval_interval_steps": 50,
    "eval_batches": 8,
}

PRESETS: dict[str, dict[str, Any]] = {
    **GROWTH_PRESETS,
    "recommended": _RECOMMENDED,
    # The geometric trigger at work, shorter: two CPU cores train it, baseline included, within minutes.
    # tau and kappa grow with the time between snapshots, so a shorter interval takes lower thresholds.
    "demo": {
        **_RECOMMENDED,
        "trigger": "geometric",
        "init": "geometric",
        "vocab_size": 2048,
        "max_steps": 480,
        "batch_size": 12,
        "lr_warmup_steps": 30,
        "collect_interval_steps": 8,
        "eval_interval_steps": 24,
        "tau_crit": 0.28,
        "kappa_crit": 0.4,
    },
}
"""Overrides on `TrainConfig`'s defaults, by name."""


def resolve(preset: str | None, file: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainConfig:
    """One configuration from a preset, overridden by a file's keys, overridden by flags.

    `preset` None takes the file's own `preset` key, else `recommended`. Keys may carry hyphens or
    underscores. Values outside a documented range give a `RangeWarning`.

    Raises
    ------
    ValueError
        For an unknown preset or key (naming the nearest), a value of the wrong type, or settings that
        cannot work.
    """
    config = merge(preset, file, flags)
    config.validate()
    for message in config.out_of_range():
        warnings.warn(message, RangeWarning, stacklevel=2)
    return config


def merge(preset: str | None, file: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainConfig:
    """As `resolve`, but whether the settings work together is not looked at."""
    from_file, from_flags = _typed(file), _typed(flags)
    named = (preset, from_flags.get("preset"), from_file.get("preset"), DEFAULT_PRESET)
    name = next(name for name in named if name is not None)
    if name not in PRESETS:
        raise ValueError(unknown("preset", name, PRESETS))
    settings = _over(_over(PRESETS[name], from_file), from_flags)
    return TrainConfig(**{**settings, "preset": name})


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file: one mapping of names to values.

    Raises
    ------
    ValueError
        Naming the file: it is missing, is no YAML, or holds an unknown setting or a wrong type.
    """
    path = Path(path)
    try:
        return _typed(read_settings_file(path))
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"config file {str(path)!r}: {error}") from error


def read_config(path: str | Path) -> TrainConfig:
    """A configuration that `write_config` wrote.

    Raises
    ------
    ValueError
        As `read_file`, and for a file that lacks a setting: its default need not be what the run had.
    """
    settings = read_file(path)
    missing = [name for name in setting_types() if name not in settings]
    if missing:
        raise ValueError(
            f"{str(path)!r} lacks {_few(missing)}: a run's file holds every setting; restore it from a copy, "
            "or add what the run was started with"
        )
    config = TrainConfig(**settings)
    config.validate()
    return config


def write_config(path: str | Path, config: TrainConfig) -> None:
    """Write every setting as YAML; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@cache  # hints are read anew from their text each time, which takes longer than all the rest of a validation
def setting_types() -> Mapping[str, Any]:
    """The type of every setting, by name, in declaration order."""
    hints = get_type_hints(TrainConfig)
    return MappingProxyType({field.name: hints[field.name] for field in fields(TrainConfig)})


def _few(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `base`; a length of the run replaces one of another kind, which would otherwise win."""
    if "num_epochs" in given or any(given.get(name) is not None for name in BUDGETS):
        base = {**base, **dict.fromkeys(BUDGETS)}
    return {**base, **given}


def _typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    types = setting_types()
    typed: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_").replace("lahr.", "lahr_")
        if name not in types:
            raise ValueError(unknown("setting", key, types))
        if name in typed:
            raise ValueError(f"{name} is given twice, with a hyphen and with an underscore: keep one")
        typed[name] = coerce(name, value, types[name])
    return {**_shape(typed.get("size")), **typed}


def _shape(size: str | None) -> dict[str, Any]:
    """What a named size stands for, in whatever does not say otherwise."""
    if size is None:
        return {}
    return {**SIZES[size], "max_layers": SIZES[size]["n_layer"], "trigger": "never", "grow_to": ()}
