"""Names, numbers and sentences of a study's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aiether.study.report._results import Arm, AtCost, Contrast, Failure, Interval, Study
from aiether.training import _format as fmt

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", fmt.count),
    "tokens": ("tokens", fmt.count),
    "flops": ("FLOPs", fmt.scientific),
    "seconds": ("training time", fmt.duration),
}
METRICS = {"eval_loss": "evaluation loss, nats per token", "bits_per_byte": "bits per byte"}
TESTS = {"t": "the paired t test", "sign_flip": "the exact sign-flip test"}


def metric_words(study: Study) -> str:
    words = METRICS.get(study.metric, study.metric)
    return f"{words}, each run's lowest (early stopping)" if study.judged == "best" else words


def short_metric(study: Study) -> str:
    return {"eval_loss": "loss", "bits_per_byte": "bits per byte"}.get(study.metric, study.metric)


def length(value: float) -> str:
    """The multiple of the study's budget."""
    return f"{value:g}" if math.isfinite(value) else fmt.NONE


def arm_name(arm: Arm, study: Study) -> str:
    """The condition, with its length where that is not the one that is compared."""
    return arm.condition if arm in study.full else f"{arm.condition}, {length(arm.length)} of the budget"


def pair_name(contrast: Contrast | AtCost) -> str:
    return f"{contrast.arm} − {contrast.against}" if contrast.against else contrast.arm


def interval(ends: Interval, show: Callable[[float], str] = fmt.loss) -> str:
    if not all(map(math.isfinite, ends)):
        return fmt.NONE
    return f"{show(ends[0])} to {show(ends[1])}"


def signed(value: float) -> str:
    return fmt.signed(value) if math.isfinite(value) else fmt.NONE


def p_value(value: float) -> str:
    if not math.isfinite(value):
        return fmt.NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def decimals(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else fmt.NONE


def rate(value: float) -> str:
    """A learning rate."""
    return f"{value:g}" if math.isfinite(value) else fmt.NONE


def share(value: float) -> str:
    return fmt.percent(value).replace("-", "−") if math.isfinite(value) else fmt.NONE


def times(value: float) -> str:
    """A speed-up: 1.32×."""
    return f"{value:.2f}×" if math.isfinite(value) else fmt.NONE


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def joined(words: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = [*words] or [fmt.NONE]
    return f"{', '.join(first)} and {last}" if first else last


# --- what the study found -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whom it is about, and what was found: a sentence, or one for each cost."""

    about: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    title: str
    verdicts: tuple[Verdict, ...]
    note: str = ""


def findings(study: Study) -> tuple[Findings, ...]:
    """The planned comparisons first, then factorial effects, equal cost, savings and what was not planned."""
    planned = [each for each in study.comparisons if each.planned]
    afterwards = [each for each in study.comparisons if not each.planned]
    found = (
        Findings("Planned comparisons", _verdicts(planned) + _not_made(study)),
        Findings("Effects of the factors", _verdicts(study.factorial)),
        Findings("At equal cost", _verdicts(study.equal_cost)),
        Findings(f"Cost of the same {short_metric(study)}", _verdicts(study.savings)),
        Findings(
            "Not planned",
            _verdicts(afterwards),
            "Looked at after the runs: hints for the next study, no tests.",
        ),
    )
    return tuple(each for each in found if each.verdicts)


_NAMED = {"tokens": ("tokens",), "flops": ("flops",), "seconds": ("seconds", "time")}


def _verdicts(found: Sequence[Contrast | AtCost]) -> tuple[Verdict, ...]:
    """One for each pair, with all that is said of it."""
    sentences: dict[str, list[str]] = {}
    for each in found:
        about = f"{each.arm} against {each.against}" if each.against else each.arm
        said = each.verdict or "nothing to say yet: no seed of both has finished"
        if isinstance(each, AtCost) and not any(name in said.lower() for name in _NAMED.get(each.cost, ())):
            said = f"{COSTS.get(each.cost, (each.cost,))[0]}: {said}"
        sentences.setdefault(about, []).append(said)
    return tuple(Verdict(about, tuple(said)) for about, said in sentences.items())


def _not_made(study: Study) -> tuple[Verdict, ...]:
    """Comparisons that were declared and of which the results say nothing."""
    made = {(each.arm, each.against) for each in study.comparisons}
    missing = [pair for pair in study.declared if pair not in made]
    return tuple(Verdict(f"{arm} against {against}", ("not compared yet",)) for arm, against in missing)


# --- what is missing ----------------------------------------------------------------------------------


def missing_cells(study: Study) -> list[tuple[Arm, int]]:
    """Runs that have neither finished nor failed."""
    return [
        (arm, seed)
        for arm in study.arms
        for seed in dict.fromkeys((*study.seeds, *(cell.seed for cell in arm.cells)))
        if not any(cell.seed == seed and cell.status in ("finished", "failed") for cell in arm.cells)
    ]


def failures(study: Study) -> list[Failure]:
    """Every run that failed: those listed, and those that only an arm knows of."""
    listed = {(each.condition, each.length, each.seed) for each in study.failures if not each.tuning}
    others = [
        Failure(arm.condition, arm.length, cell.seed, arm.lr, False, cell.reason)
        for arm in study.arms
        for cell in arm.cells
        if cell.status == "failed" and (arm.condition, arm.length, cell.seed) not in listed
    ]
    return [*study.failures, *others]


def notices(study: Study) -> tuple[str, ...]:
    """What the reader has to know before any number: what has not run, failed, or was tuned at an edge."""
    missing, failed = missing_cells(study), failures(study)
    total = sum(len({*study.seeds, *(cell.seed for cell in arm.cells)}) for arm in study.arms)
    found: list[str] = []
    if missing:
        found.append(
            f"Not finished: {len(missing)} of {total} runs are missing. What stands here is what there is so "
            "far; the command at the foot of the page runs the rest."
        )
    if failed:
        runs = "1 run has" if len(failed) == 1 else f"{len(failed)} runs have"
        found.append(f"{runs} failed, which the statistics lack: see Failed and missing runs.")
    edges = [each.condition for each in study.tuning if each.at_edge]
    if edges:
        found.append(
            f"The best learning rate lies at the edge of the grid for {joined(edges)}: a better one may lie "
            "beyond it."
        )
    return (*found, *(short for arm in study.arms if (short := _stayed_small(arm))))


def _stayed_small(arm: Arm) -> str | None:
    """Said where models did not become as deep as planned: the arm is then not what its name says."""
    short = [cell.depth for cell in arm.finished if cell.depth < arm.planned_depth]
    if not short:
        return None
    depths = " or ".join(f"{depth:g}" for depth in sorted(set(short)))
    return (
        f"{arm.condition} was planned to end with {arm.planned_depth:g} layers, and ended with {depths} in "
        f"{len(short)} of {len(arm.finished)} runs: its trigger found no (further) growth in time."
    )
