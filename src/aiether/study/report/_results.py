"""What `results.json` holds, checked and named. Numbers that are null or absent are NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from aiether.training.report.run_records import as_number

ADVICE = "Run `aiether study run` on it again: it writes results.json anew from the cells it finds."
Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class Growth:
    """One insertion of layers in a cell."""

    step: float
    depth_before: float
    depth_after: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Cell:
    """One run: an arm with one seed. `costs` by steps, tokens, flops and seconds."""

    seed: int
    status: str
    reason: str
    metric: float
    bits_per_byte: float
    depth: float
    costs: Mapping[str, float]
    growths: tuple[Growth, ...]
    tokens_per_s: float
    mfu: float
    processor: str
    folder: str

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class Summary:
    """The metric of an arm over its finished seeds."""

    n: int
    mean: float
    sd: float
    ci95: Interval
    median: float
    iqm: float
    iqm_ci95: Interval


@dataclass(frozen=True)
class Arm:
    """A condition at one length."""

    condition: str
    length: float
    about: str
    settings: Mapping[str, Any]
    lr: float
    planned_depth: float
    parameters: Interval  # at the start and at the end
    flops_per_token: Interval
    cells: tuple[Cell, ...]
    summary: Summary

    @property
    def finished(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.finished)


@dataclass(frozen=True)
class Contrast:
    """A paired comparison or, with `against` empty, an effect of a factorial design."""

    arm: str
    against: str
    planned: bool
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    ci95: Interval
    t_p: float
    sign_flip_p: float
    t_p_holm: float
    sign_flip_p_holm: float
    dz: float
    smallest_p: float
    detectable: float
    verdict: str


@dataclass(frozen=True)
class AtCost:
    """An arm against the baseline's cost-quality curve: `values` are differences of loss, or shares saved."""

    arm: str
    against: str
    cost: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    ci95: Interval
    verdict: str
    beyond: float = 0.0  # seeds that ended better than the baseline's longest run

    @property
    def n(self) -> int:
        return sum(map(math.isfinite, self.values))


@dataclass(frozen=True)
class Tuning:
    """The learning rates tried for a condition: (rate, metric)."""

    condition: str
    tried: tuple[tuple[float, float], ...]
    chosen: float
    at_edge: bool


@dataclass(frozen=True)
class Failure:
    condition: str
    length: float
    seed: int
    lr: float
    tuning: bool
    reason: str


@dataclass(frozen=True)
class Study:
    """A study's results as far as they go."""

    name: str
    question: str
    preset: str
    baselines: tuple[str, ...]  # the conditions that others are held against, the first by default
    metric: str
    judged: str
    budget: Mapping[str, Any]
    seeds: tuple[int, ...]
    lengths: tuple[float, ...]
    alpha: float
    declared: tuple[tuple[str, str], ...]
    test: str
    eval_windows: float
    factors: Mapping[str, Any]
    shared: Mapping[str, Any]  # settings that all conditions have: base, pretrain, retrofit
    command: str
    hash: str
    environment: Mapping[str, Any]
    arms: tuple[Arm, ...]
    tuning: tuple[Tuning, ...] = ()
    comparisons: tuple[Contrast, ...] = ()
    factorial: tuple[Contrast, ...] = ()
    equal_cost: tuple[AtCost, ...] = ()
    savings: tuple[AtCost, ...] = ()
    failures: tuple[Failure, ...] = field(default=())

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions, baselines first."""
        names = dict.fromkeys(arm.condition for arm in self.arms)
        first = [name for name in self.baselines if name in names]
        return tuple(dict.fromkeys([*first, *names]))

    @cached_property
    def full(self) -> tuple[Arm, ...]:
        """Each condition at the length that is compared: 1, or its longest if it was not run at 1."""
        of = {name: [arm for arm in self.arms if arm.condition == name] for name in self.conditions}
        return tuple(
            next((arm for arm in arms if arm.length == 1.0), max(arms, key=lambda arm: arm.length))
            for arms in of.values()
        )


def read_results(study_dir: Path) -> Study:
    """The results of a study's folder.

    Raises:
        ValueError: There is no `results.json`, or it is damaged; the message says what to do.
    """
    path = study_dir / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{study_dir} holds no results.json. Give the folder of a study, or run the study first: "
            "`aiether study run` writes it."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else "it is no JSON"
        raise ValueError(f"{path} is damaged ({reason}). {ADVICE}") from error
    try:
        return parse_results(results)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {ADVICE}") from error


def parse_results(results: Any) -> Study:
    """Checks and names what a results mapping holds.

    Raises:
        ValueError: Something is missing or of another kind; the message names it, such as
            `arms[2].cells[0].seed is missing`.
    """
    root = Node(_clean(results), "")
    study = root.node("study")
    return Study(
        name=study.text("name"),
        question=study.text("question", ""),
        preset=study.text("preset", ""),
        baselines=_baselines(study),
        metric=study.text("metric", "eval_loss"),
        judged=study.text("judged", "last"),
        budget=study.mapping("budget"),
        seeds=study.whole_numbers("seeds"),
        lengths=study.numbers("lengths"),
        alpha=study.number("alpha"),
        declared=tuple((each.text("arm"), each.text("against")) for each in study.nodes("declared")),
        test=study.text("test", ""),
        eval_windows=study.number("eval_windows"),
        factors=study.mapping("factors"),
        shared=study.mapping("shared"),
        command=study.text("command", ""),
        hash=study.text("hash", ""),
        environment=root.mapping("environment"),
        arms=tuple(_arm(each) for each in root.nodes("arms", required=True)),
        tuning=tuple(_tuning(each) for each in root.nodes("tuning")),
        comparisons=tuple(_contrast(each, "arm") for each in root.nodes("comparisons")),
        factorial=tuple(_contrast(each, "effect") for each in root.nodes("factorial")),
        equal_cost=tuple(_at_cost(each, "differences") for each in root.nodes("equal_cost")),
        savings=tuple(_at_cost(each, "savings") for each in root.nodes("savings")),
        failures=tuple(_failure(each) for each in root.nodes("failures")),
    )


def _baselines(study: Node) -> tuple[str, ...]:
    first = study.text("baseline", "")
    return tuple(dict.fromkeys([*([first] if first else []), *study.texts("baselines")]))


def _arm(node: Node) -> Arm:
    return Arm(
        condition=node.text("condition"),
        length=node.number("length", required=True),
        about=node.text("about", ""),
        settings=node.mapping("settings"),
        lr=node.number("lr"),
        planned_depth=node.node("depth", required=False).number("planned", required=False),
        parameters=_start_and_end(node.node("parameters", required=False)),
        flops_per_token=_start_and_end(node.node("flops_per_token", required=False)),
        cells=tuple(_cell(each) for each in node.nodes("cells", required=True)),
        summary=_summary(node.node("summary", required=False)),
    )


def _start_and_end(node: Node) -> Interval:
    return node.number("start"), node.number("end")


def _cell(node: Node) -> Cell:
    timings = node.node("timings", required=False)
    costs = {name: node.number(name) for name in ("steps", "tokens", "flops")}
    return Cell(
        seed=node.whole_number("seed"),
        status=node.text("status"),
        reason=node.text("reason", ""),
        metric=node.number("metric"),
        bits_per_byte=node.number("bits_per_byte"),
        depth=node.number("depth"),
        costs={**costs, "seconds": timings.number("seconds")},
        growths=tuple(_growth(each) for each in node.nodes("growths")),
        tokens_per_s=timings.number("tokens_per_s"),
        mfu=timings.number("mfu"),
        processor=timings.text("processor", ""),
        folder=node.text("folder", ""),
    )


def _growth(node: Node) -> Growth:
    names = ("step", "depth_before", "depth_after", "loss_before", "loss_after")
    return Growth(**{name: node.number(name) for name in names})


def _summary(node: Node) -> Summary:
    return Summary(
        n=node.whole_number("n", 0),
        ci95=node.interval("ci95"),
        iqm_ci95=node.interval("iqm_ci95"),
        **{name: node.number(name) for name in ("mean", "sd", "median", "iqm")},
    )


_P_VALUES = ("t_p", "sign_flip_p", "t_p_holm", "sign_flip_p_holm", "dz", "smallest_p", "detectable")


def _contrast(node: Node, name: str) -> Contrast:
    return Contrast(
        arm=node.text(name),
        against=node.text("against", ""),
        planned=bool(node.record.get("planned", True)),
        seeds=node.whole_numbers("seeds"),
        differences=node.numbers("differences"),
        mean=node.number("mean"),
        ci95=node.interval("ci95"),
        verdict=node.text("verdict", ""),
        **{each: node.number(each) for each in _P_VALUES},
    )


def _at_cost(node: Node, values: str) -> AtCost:
    return AtCost(
        arm=node.text("arm"),
        against=node.text("against", ""),
        cost=node.text("cost"),
        seeds=node.whole_numbers("seeds"),
        values=node.numbers(values),
        mean=node.number("mean"),
        ci95=node.interval("ci95"),
        verdict=node.text("verdict", ""),
        beyond=node.number("beyond"),
    )


def _tuning(node: Node) -> Tuning:
    return Tuning(
        condition=node.text("condition"),
        tried=tuple((each.number("lr"), each.number("metric")) for each in node.nodes("tried")),
        chosen=node.number("chosen"),
        at_edge=bool(node.record.get("at_edge", False)),
    )


def _failure(node: Node) -> Failure:
    return Failure(
        condition=node.text("condition"),
        length=node.number("length"),
        seed=node.whole_number("seed"),
        lr=node.number("lr"),
        tuning=bool(node.record.get("tuning", False)),
        reason=node.text("reason", ""),
    )


class Node:
    """An object of the file with the way to it, so that an error can name what is wrong."""

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"{where or 'the whole'} is no object")
        self.record: dict[str, Any] = record
        self.where = where

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _get(self, key: str, kind: type | tuple[type, ...], what: str, default: Any) -> Any:
        """The value; `default` if it is null or absent, unless that is `...`."""
        value = self.record.get(key)
        if value is None:
            if default is ...:
                raise ValueError(f"{self._name(key)} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self._name(key)} is no {what}")
        return value

    def text(self, key: str, default: Any = ...) -> str:
        return self._get(key, str, "text", default)

    def number(self, key: str, *, required: bool = False) -> float:
        return as_number(self._get(key, (int, float), "number", ... if required else math.nan))

    def whole_number(self, key: str, default: Any = ...) -> int:
        value = as_number(self._get(key, (int, float), "number", default))
        if not math.isfinite(value) or value != round(value):
            raise ValueError(f"{self._name(key)} is no whole number")
        return round(value)

    def node(self, key: str, *, required: bool = True) -> Node:
        return Node(self._get(key, dict, "object", ... if required else {}), self._name(key))

    def mapping(self, key: str) -> Mapping[str, Any]:
        return self._get(key, dict, "object", {})

    def nodes(self, key: str, *, required: bool = False) -> list[Node]:
        values = self._get(key, list, "list", ... if required else [])
        return [Node(value, f"{self._name(key)}[{index}]") for index, value in enumerate(values)]

    def texts(self, key: str) -> list[str]:
        values = self._get(key, list, "list", [])
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self._name(key)} holds something that is no text")
        return values

    def numbers(self, key: str) -> tuple[float, ...]:
        values: Sequence[Any] = self._get(key, list, "list", [])
        if not all(value is None or isinstance(value, int | float) for value in values):
            raise ValueError(f"{self._name(key)} holds something that is no number")
        return tuple(map(as_number, values))

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        values = self.numbers(key)
        if not all(math.isfinite(value) and value == round(value) for value in values):
            raise ValueError(f"{self._name(key)} holds something that is no whole number")
        return tuple(map(round, values))

    def interval(self, key: str) -> Interval:
        values = self.numbers(key)
        if len(values) not in (0, 2):
            raise ValueError(f"{self._name(key)} is no interval of two numbers")
        return (values[0], values[1]) if values else UNKNOWN


_UNPRINTABLE = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}
_UNPRINTABLE |= dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\N{REPLACEMENT CHARACTER}")


def _clean(value: Any) -> Any:
    """Without characters that no page and no drawing can hold."""
    if isinstance(value, str):
        return value.translate(_UNPRINTABLE)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
