"""What a study is, declared before it runs: conditions, seeds, a budget, a metric, planned comparisons."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from aiether.training.coerce import coerce, unknown
from aiether.training.settings_file import read_settings_file

BudgetUnit = Literal["steps", "tokens", "flops", "seconds"]
Metric = Literal["eval_loss", "bits_per_byte"]
Judged = Literal["last", "best"]
Test = Literal["t", "sign_flip"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a condition says of its models; checked before the study runs, and by how each run ended.

    Attributes
    ----------
    parameters: stored numbers of the model at the end, tied ones once.
    final_depth: layers at the end.
    same_parameters_as: another condition that ends with as many parameters.
    same_flops_as: another condition whose tokens cost as much at the end, head and attention included.
    absent, present: parts of tensor names that no tensor, or at least one, has ("router").
    """

    parameters: int | None = None
    final_depth: int | None = None
    same_parameters_as: str | None = None
    same_flops_as: str | None = None
    absent: tuple[str, ...] = ()
    present: tuple[str, ...] = ()

    @property
    def about_the_end(self) -> bool:
        """Whether a run that ends with another depth than planned breaks a claim."""
        sizes = (self.parameters, self.final_depth, self.same_parameters_as, self.same_flops_as)
        return any(size is not None for size in sizes)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One arm: what it changes of the study's base, in the settings of `aiether train`.

    `baseline`: what it is compared with, where that is not the study's own baseline. `retrofit`: what it
    changes of the study's `retrofit`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    retrofit: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    baseline: str | None = None
    claims: Claims = Claims()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A planned comparison of two conditions, seed by seed."""

    arm: str
    against: str


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A grid of learning rates that every condition is given alike, on a seed of its own."""

    lr: tuple[float, ...]
    seed: int = 1000


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A whole study.

    Attributes
    ----------
    name, question: what it is called and what it asks.
    base: settings of `aiether train` that all conditions share.
    conditions: by name. Factorial ones are added from `factors`: factor -> level -> settings.
    seeds: each seed is one block: same data order, same initial weights for every shared tensor.
    budget_unit, budget: what every arm may spend.
    baseline: the condition that others are compared with, and whose cost-quality curve is drawn. A condition
        may name another one; there are then several.
    lengths: multiples of the budget at which a baseline is run, each on a schedule of its own.
    eval_windows: validation windows of every evaluation, the same ones for all arms.
    metric, test, alpha: the primary metric (lower is better), the test that decides and its level.
    judged: by which of its evaluations a run is judged: the last one, or the best (early stopping; what it
        spent is what it had spent by then).
    comparisons: what is tested, with Holm's correction over all; None: each condition against the baseline.
    tuning: learning rates tried for every condition before the seeds run.
    keep_models: keep final models and checkpoints of finished cells.
    allow_identical_arms: two conditions may be the same, to see what the method itself adds (nothing).
    pretrain, retrofit: of a study of retrofitted models. The model of `base` is trained once, with the
        settings that `pretrain` changes, before anything else; each run then begins from it, converts and
        tunes it as `retrofit` and its condition say (see `aiether.retrofitting.arm_settings`), within the
        budget.
    presets: name -> changes of this specification, as in `--preset cpu`.
    """

    name: str
    question: str
    base: Mapping[str, Any]
    conditions: Mapping[str, Condition]
    seeds: tuple[int, ...]
    budget_unit: BudgetUnit
    budget: float
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    baseline: str | None = None
    lengths: tuple[float, ...] = (1.0,)
    eval_windows: int = 64
    metric: Metric = "eval_loss"
    judged: Judged = "last"
    test: Test = "t"
    alpha: float = 0.05
    comparisons: tuple[Comparison, ...] | None = None
    tuning: Tuning | None = None
    pretrain: Mapping[str, Any] | None = None
    retrofit: Mapping[str, Any] | None = None
    keep_models: bool = False
    allow_identical_arms: bool = False
    preset: str | None = None

    def all_conditions(self) -> dict[str, Condition]:
        """The named conditions, then one for each combination of the factors' levels."""
        return {**self.conditions, **factorial_conditions(self.factors)}

    def planned(self) -> tuple[Comparison, ...]:
        """The comparisons that are tested."""
        if self.comparisons is not None:
            return self.comparisons
        pairs = [(name, self.baseline_of(name)) for name in self.all_conditions()]
        return tuple(Comparison(arm=arm, against=other) for arm, other in pairs if other is not None)

    def baseline_of(self, condition: str) -> str | None:
        """What a condition is compared with: its own baseline, else the study's; None for that one itself."""
        named = self.all_conditions()[condition].baseline or self.baseline
        return None if named == condition else named

    def baselines(self) -> tuple[str, ...]:
        """The conditions that others are compared with."""
        named = [self.baseline, *(each.baseline for each in self.all_conditions().values())]
        return tuple(dict.fromkeys(name for name in named if name is not None))


def factorial_conditions(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Condition]:
    """Every combination of levels, named as in `mod.on+memory.off`."""
    if not factors:
        return {}
    found = {}
    for levels in itertools.product(*factors.values()):
        chosen = dict(zip(factors, levels, strict=True))
        settings: dict[str, Any] = {}
        for factor, level in chosen.items():
            settings |= factors[factor][level]
        found[combination(levels, list(factors))] = Condition(
            settings=settings, about=", ".join(f"{factor} {level}" for factor, level in chosen.items())
        )
    return found


def combination(levels: Sequence[str], factors: Sequence[str]) -> str:
    """The name of the condition at these levels of the factors."""
    return "+".join(f"{factor}.{level}" for factor, level in zip(factors, levels, strict=True))


# -- reading ----------------------------------------------------------------------------------------------


def read_spec(path: str | Path, preset: str | None = None) -> StudySpec:
    """A specification from YAML, with the changes of one of its presets.

    Raises
    ------
    ValueError
        Naming the file and what is wrong in it: an unknown key, a missing one, a value of the wrong type.
    """
    path = Path(path)
    content = read_settings_file(path)
    try:
        return spec_from(content, preset)
    except ValueError as error:
        raise ValueError(f"study {str(path)!r}: {error}") from error


def presets_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The presets of a study's file."""
    return dict(_mapping("presets", content.get("presets") or {}))


def spec_from(content: Mapping[str, Any], preset: str | None = None) -> StudySpec:
    """A specification from plain values, as `read_spec`."""
    presets = presets_of(content)
    if preset is not None and preset not in presets:
        raise ValueError(unknown("preset", preset, presets))
    merged = {key: value for key, value in content.items() if key != "presets"}
    merged = _merge(merged, _mapping("presets", presets[preset])) if preset is not None else merged
    for key in merged:
        if key not in _KEYS:
            raise ValueError(unknown("key", key, _KEYS))
    for key in ("name", "question", "seeds", "budget"):
        if key not in merged:
            raise ValueError(f"{key} is missing; a study names {', '.join(_REQUIRED)}")
    unit, amount = _budget(merged["budget"])
    comparisons = merged.get("comparisons")
    spec = StudySpec(
        base=dict(_mapping("base", merged.get("base") or {})),
        conditions={
            str(name): _condition(str(name), value)
            for name, value in _mapping("conditions", merged.get("conditions") or {}).items()
        },
        factors=_factors(merged.get("factors") or {}),
        seeds=_seeds(merged["seeds"]),
        budget_unit=unit,
        budget=amount,
        comparisons=None if comparisons is None else tuple(_comparison(item) for item in _list(comparisons)),
        tuning=None if merged.get("tuning") is None else _record(Tuning, "tuning", merged["tuning"]),
        pretrain=_given("pretrain", merged),
        retrofit=_given("retrofit", merged),
        preset=preset,
        **{name: coerce(name, merged[name], _HINTS[name]) for name in _SIMPLE if name in merged},
    )
    check_form(spec)
    return spec


def check_form(spec: StudySpec) -> None:
    """Raise ValueError for what is wrong in a specification by itself, whatever its settings mean."""
    for what, names in (
        ("name", [spec.name]),
        ("condition", spec.conditions),
        ("factor", spec.factors),
        ("level", [level for levels in spec.factors.values() for level in levels]),
    ):
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{what} {name!r}: a name has up to 64 letters, digits, '_', '.', '+' and '-', the first "
                    "a letter or digit"
                )
    conditions = spec.all_conditions()
    if not conditions:
        raise ValueError("there are no conditions; name some, or factors with levels")
    _check_factors(spec)
    _check_retrofit(spec)
    references = [("baseline", name) for name in spec.baselines()]
    references += [("comparison", name) for each in spec.planned() for name in (each.arm, each.against)]
    for name, condition in conditions.items():
        others = (condition.claims.same_parameters_as, condition.claims.same_flops_as)
        references += [(f"claim of {name}", other) for other in others if other is not None]
    for what, name in references:
        if name not in conditions:
            raise ValueError(f"{what}: {unknown('condition', str(name), conditions)}")
    for each in spec.planned():
        if each.arm == each.against:
            raise ValueError(f"comparison of {each.arm} with itself: name two conditions")
    pairs = [(each.arm, each.against) for each in spec.planned()]
    if len(set(pairs)) < len(pairs):
        raise ValueError("a comparison is planned twice: keep one of them")
    _check_numbers(spec)


def _check_retrofit(spec: StudySpec) -> None:
    for name, condition in spec.all_conditions().items():
        if condition.retrofit and spec.retrofit is None:
            raise ValueError(f"condition {name} has a retrofit, and the study none: give it retrofit: {{}}")
    if (spec.retrofit is None) != (spec.pretrain is None):
        raise ValueError("retrofit and pretrain belong together: a model is trained, then converted")
    if spec.retrofit is not None and spec.budget_unit != "steps":
        raise ValueError(f"budget is in {spec.budget_unit}: a study of retrofitted models has one in steps")


def _check_factors(spec: StudySpec) -> None:
    for factor, levels in spec.factors.items():
        if len(levels) != 2:
            raise ValueError(
                f"factor {factor} has {len(levels)} level(s): two are meant, as in off and on; "
                "compare more than two as conditions"
            )


def _check_numbers(spec: StudySpec) -> None:
    if len(set(spec.seeds)) < len(spec.seeds) or min(spec.seeds, default=-1) < 0:
        raise ValueError(
            f"seeds are {list(spec.seeds)}: different whole numbers from 0 are meant, or how many"
        )
    if spec.tuning and (len(set(spec.tuning.lr)) < 2 or not all(0 < lr < math.inf for lr in spec.tuning.lr)):
        raise ValueError(f"tuning.lr is {list(spec.tuning.lr)}: at least two different rates are meant")
    if spec.tuning and spec.tuning.seed in spec.seeds:
        raise ValueError(
            f"tuning.seed is {spec.tuning.seed}, one of the study's seeds: rates are chosen on another, or "
            "the choice would flatter that seed"
        )
    if not 0 < spec.budget < math.inf:
        raise ValueError(f"budget is {spec.budget_unit}: {spec.budget:g}; it must be greater than 0")
    if not 0 < spec.alpha < 0.5:
        raise ValueError(f"alpha is {spec.alpha}: a level such as 0.05 is meant")
    if spec.eval_windows < 1:
        raise ValueError(f"eval_windows is {spec.eval_windows}: at least 1 is needed")
    _check_lengths(spec)


def _check_lengths(spec: StudySpec) -> None:
    lengths = spec.lengths
    if not all(0 < length < math.inf for length in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(
            f"lengths are {list(lengths)}: different multiples of the budget, above 0, are meant"
        )
    if 1.0 not in lengths:
        raise ValueError(f"lengths are {list(lengths)}: 1 must be among them, the budget itself")
    if len(lengths) == 2:
        raise ValueError(
            f"lengths are {list(lengths)}: a curve takes at least three (or 1 alone, for no curve)"
        )
    if len(lengths) > 1 and not spec.baselines():
        raise ValueError("lengths are those of the baseline: name one with baseline")


_SIMPLE = (
    "name",
    "question",
    "baseline",
    "lengths",
    "eval_windows",
    "metric",
    "judged",
    "test",
    "alpha",
    "keep_models",
    "allow_identical_arms",
)
_REQUIRED = ("name", "question", "base", "conditions", "seeds", "budget")
_KEYS = (
    *(*_SIMPLE, "base", "conditions", "factors", "seeds", "budget", "comparisons", "tuning"),
    *("pretrain", "retrofit"),
)
_CONDITION_KEYS = ("settings", "about", "baseline", "claims", "retrofit")
_HINTS = get_type_hints(StudySpec)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes over a base: mappings key by key, everything else as a whole; null takes a key out."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None and key not in merged:
            raise ValueError(
                f"a preset takes out {key!r}, which is not there: {unknown('key', str(key), merged)}"
            )
        if value is None:
            del merged[key]
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "budget":
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _mapping(what: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}: names with values below them are meant")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{value!r}: a list is meant")
    return value


def _record(kind: type, what: str, value: Any) -> Any:
    """A dataclass of plain values from a mapping."""
    hints = get_type_hints(kind)
    known = [each.name for each in fields(kind)]
    for key in _mapping(what, value):
        if key not in known:
            raise ValueError(f"{what}: {unknown('key', str(key), known)}")
    try:
        return kind(**{key: coerce(f"{what}.{key}", item, hints[key]) for key, item in value.items()})
    except TypeError as error:
        raise ValueError(f"{what} lacks a key; it has {', '.join(known)}") from error


def _condition(name: str, value: Any) -> Condition:
    value = _mapping(f"condition {name}", {} if value is None else value)
    for key in value:
        if key not in _CONDITION_KEYS:
            raise ValueError(
                f"condition {name}: {unknown('key', str(key), _CONDITION_KEYS)}; settings of the run stand "
                "under settings"
            )
    return Condition(
        settings=dict(_mapping(f"settings of {name}", value.get("settings") or {})),
        about=coerce(f"about of {name}", value.get("about", ""), str),
        baseline=coerce(f"baseline of {name}", value.get("baseline"), str | None),
        claims=_record(Claims, f"claims of {name}", value.get("claims") or {}),
        retrofit=dict(_mapping(f"retrofit of {name}", value.get("retrofit") or {})),
    )


def _given(key: str, merged: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if merged.get(key) is None else dict(_mapping(key, merged[key]))


def _factors(value: Any) -> dict[str, dict[str, dict[str, Any]]]:
    found = {}
    for factor, levels in _mapping("factors", value).items():
        levels = _mapping(f"factor {factor}", levels)
        # YAML reads the bare words on and off as true and false.
        words = {True: "on", False: "off"}
        found[str(factor)] = {
            words[level] if isinstance(level, bool) else str(level): dict(
                _mapping(f"level {level} of {factor}", settings or {})
            )
            for level, settings in levels.items()
        }
    return found


def _comparison(value: Any) -> Comparison:
    comparison: Comparison = _record(Comparison, "comparison", value)
    return comparison


def _seeds(value: Any) -> tuple[int, ...]:
    """A list of seeds, or how many."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= 1000:
            raise ValueError(f"seeds is {value}: from 1 to 1000 are meant, or a list")
        return tuple(range(value))
    return coerce("seeds", value, tuple[int, ...])


def _budget(value: Any) -> tuple[BudgetUnit, float]:
    units = get_args(BudgetUnit)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"budget is {value!r}: one of {', '.join(units)} is meant, as in budget: {{tokens: 1e6}}"
        )
    ((unit, amount),) = value.items()
    if unit not in units:
        raise ValueError(unknown("budget", str(unit), units))
    return unit, coerce(f"budget.{unit}", amount, float)


# -- writing ----------------------------------------------------------------------------------------------


def plain(spec: StudySpec) -> dict[str, Any]:
    """The specification as `spec_from` reads it, presets resolved."""
    content: dict[str, Any] = {
        name: list(value) if isinstance(value := getattr(spec, name), tuple) else value
        for name in _SIMPLE
        if getattr(spec, name) is not None
    }
    content["base"] = dict(spec.base)
    content["conditions"] = {name: _plain_condition(each) for name, each in spec.conditions.items()}
    if spec.factors:
        content["factors"] = {name: {k: dict(v) for k, v in ls.items()} for name, ls in spec.factors.items()}
    content["seeds"] = list(spec.seeds)
    content["budget"] = {spec.budget_unit: spec.budget}
    if spec.comparisons is not None:
        content["comparisons"] = [{"arm": each.arm, "against": each.against} for each in spec.comparisons]
    if spec.tuning is not None:
        content["tuning"] = {"lr": list(spec.tuning.lr), "seed": spec.tuning.seed}
    for key in ("pretrain", "retrofit"):
        if (value := getattr(spec, key)) is not None:
            content[key] = dict(value)
    return content


def _plain_condition(condition: Condition) -> dict[str, Any]:
    claims = {
        each.name: list(value) if isinstance(value, tuple) else value
        for each in fields(Claims)
        if (value := getattr(condition.claims, each.name)) not in (None, ())
    }
    found: dict[str, Any] = {"settings": dict(condition.settings)}
    if condition.baseline:
        found["baseline"] = condition.baseline
    if condition.retrofit:
        found["retrofit"] = dict(condition.retrofit)
    if condition.about:
        found["about"] = condition.about
    if claims:
        found["claims"] = claims
    return found
