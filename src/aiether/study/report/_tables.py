"""The tables of a study's report, as the page and `tables.md` show them alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiether.study.report import _words as words
from aiether.study.report._results import Arm, AtCost, Cell, Contrast, Interval, Study
from aiether.training import _format as fmt
from aiether.training.report.tables import Grid, settings


@dataclass(frozen=True)
class Table:
    """A table with its title and a note below it. `look`: facts (numbers) or prose (words in its cells)."""

    title: str
    grid: Grid
    note: str = ""
    look: str = "facts"
    folded: bool = False


def what_each_arm_is(study: Study) -> Table:
    rows = [
        (
            arm.condition,
            words.length(arm.length),
            _layers(arm),
            words.rate(arm.lr),
            _start_and_end(arm.parameters, fmt.count),
            _start_and_end(arm.flops_per_token, fmt.count),
        )
        for arm in study.arms
    ]
    columns = ("condition", "length", "layers", "learning rate", "parameters", "FLOPs per token")
    return Table(
        "What each arm is",
        Grid(columns, tuple(rows)),
        "Length: the multiple of the study's budget that the run was planned for, with a schedule of its "
        "own. FLOPs per token: forward and backward, attention and output head included.",
    )


def _layers(arm: Arm) -> str:
    """From the depth at the start to that at the end; several where seeds differ."""
    ways = {
        (cell.growths[0].depth_before if cell.growths else cell.depth, cell.depth) for cell in arm.finished
    }
    return ", ".join(_start_and_end(way, fmt.count) for way in sorted(ways)) or fmt.NONE


def _start_and_end(pair: Interval, show: Callable[[float], str]) -> str:
    start, end = pair
    return show(end) if start == end or not math.isfinite(start) else f"{show(start)} → {show(end)}"


def what_came_out(study: Study) -> Table:
    bits = study.metric != "bits_per_byte"
    mfu = any(math.isfinite(cell.mfu) for arm in study.arms for cell in arm.finished)
    columns = [
        "condition",
        "length",
        "steps",
        "tokens",
        "FLOPs",
        "time",
        "tokens/s",
        *(["MFU"] if mfu else ()),
    ]
    columns += [words.short_metric(study), "95 % interval", *(["bits/byte"] if bits else ()), "seeds"]
    rows = [
        (
            arm.condition,
            words.length(arm.length),
            *(show(_mean_cost(arm, name)) for name, (_, show) in words.COSTS.items()),
            fmt.count(_mean(arm, lambda cell: cell.tokens_per_s)),
            *([words.share(_mean(arm, lambda cell: cell.mfu))] if mfu else ()),
            fmt.loss(arm.summary.mean),
            words.interval(arm.summary.ci95),
            *([fmt.loss(_mean(arm, lambda cell: cell.bits_per_byte))] if bits else ()),
            f"{len(arm.finished)} of {_planned_seeds(study, arm)}",
        )
        for arm in study.arms
    ]
    return Table(
        "What came out",
        Grid(tuple(columns), tuple(rows)),
        f"Means over the finished seeds. The {words.short_metric(study)} is {_which(study)}. "
        "Time is training time, without evaluating and saving.",
    )


def _which(study: Study) -> str:
    unit = _unit(study)
    if study.judged == "best":
        return f"each run's lowest, in {unit}, and its steps, tokens, FLOPs and time are those up to there"
    return f"that of the last evaluation, in {unit}"


def _unit(study: Study) -> str:
    return "nats per token" if study.metric == "eval_loss" else study.metric.replace("_", " ")


def _planned_seeds(study: Study, arm: Arm) -> int:
    return len({*study.seeds, *(cell.seed for cell in arm.cells)})


def _mean(arm: Arm, read: Callable[[Cell], float]) -> float:
    return words.mean(read(cell) for cell in arm.finished)


def _mean_cost(arm: Arm, cost: str) -> float:
    return _mean(arm, lambda cell: cell.costs[cost])


def spread(study: Study) -> Table:
    rows = [
        (
            arm.condition,
            words.length(arm.length),
            str(arm.summary.n),
            fmt.loss(arm.summary.mean),
            words.decimals(arm.summary.sd, 4),
            fmt.loss(arm.summary.median),
            fmt.loss(arm.summary.iqm),
            words.interval(arm.summary.iqm_ci95),
        )
        for arm in study.arms
    ]
    columns = ("condition", "length", "seeds", "mean", "sd", "median", "IQM", "95 % interval of the IQM")
    return Table(
        "Spread over the seeds",
        Grid(columns, tuple(rows)),
        "IQM: mean of the middle half of the seeds; its interval is bootstrapped, too narrow with few seeds.",
    )


def by_seed(study: Study) -> Table:
    seeds = sorted({*study.seeds, *(cell.seed for arm in study.arms for cell in arm.cells)})
    rows = [
        (arm.condition, words.length(arm.length), *(_result(arm, seed) for seed in seeds))
        for arm in study.arms
    ]
    columns = ("condition", "length", *(f"seed {seed}" for seed in seeds))
    title = f"Final {words.short_metric(study)} of every run"
    return Table(title, Grid(columns, tuple(rows)), folded=True)


def _result(arm: Arm, seed: int) -> str:
    found = [cell for cell in arm.cells if cell.seed == seed]
    if not found or not found[0].finished:
        return found[0].status if found else "missing"
    return "no number" if math.isnan(found[0].metric) else f"{found[0].metric:.4f}"


# --- comparisons ------------------------------------------------------------------------------------------


def comparisons(study: Study) -> Table:
    return Table(
        "Comparisons",
        _contrast_grid(study.comparisons, "comparison"),
        f"Differences in {words.short_metric(study)}, seed by seed; negative: the first is better. p after "
        "Holm counts all planned comparisons. Smallest p: what the sign-flip test can reach at all with so "
        "many seeds. Detectable: the difference that so many seeds would have shown.",
    )


def effects(study: Study) -> Table:
    return Table(
        "Effects of the factors",
        _contrast_grid(study.factorial, "effect"),
        "A main effect is the change when the factor is switched on, averaged over the levels of the others; "
        "an interaction of two is half of what one of them changes in the other's effect.",
    )


def _contrast_grid(contrasts: Sequence[Contrast], first: str) -> Grid:
    columns = (
        first,
        "seeds",
        "difference",
        "95 % interval",
        "t test p",
        "after Holm",
        "sign-flip p",
        "after Holm",
    )
    rows = [
        (
            words.pair_name(each) + ("" if each.planned else " (not planned)"),
            str(len(each.seeds) or len(each.differences)),
            words.signed(each.mean),
            words.interval(each.ci95, words.signed),
            words.p_value(each.t_p),
            words.p_value(each.t_p_holm),
            words.p_value(each.sign_flip_p),
            words.p_value(each.sign_flip_p_holm),
            words.decimals(each.dz),
            words.p_value(each.smallest_p),
            fmt.loss(each.detectable),
        )
        for each in contrasts
    ]
    return Grid((*columns, "d_z", "smallest p", "detectable"), tuple(rows))


def equal_cost(study: Study) -> Table:
    rows = [
        (
            words.pair_name(each),
            _cost_name(each.cost),
            words.signed(each.mean),
            words.interval(each.ci95, words.signed),
            _seeds(each),
        )
        for each in study.equal_cost
    ]
    columns = ("comparison", "at equal", "difference", "95 % interval", "seeds")
    return Table(
        "At equal cost",
        Grid(columns, tuple(rows)),
        f"The arm's {words.short_metric(study)} minus the baseline's at the same cost, read off the "
        "baseline's own curve through its lengths, seed by seed; never outside the lengths that were run.",
    )


def savings(study: Study) -> Table:
    rows = [_saving_row(study, each) for each in study.savings]
    columns = (
        "comparison",
        "cost",
        "spent",
        "baseline's",
        "saved",
        "95 % interval",
        "speed-up",
        "seeds",
        "beyond",
    )
    return Table(
        f"Cost of the same {words.short_metric(study)}",
        Grid(columns, tuple(rows)),
        f"What the baseline would spend on the {words.short_metric(study)} that the arm ended with, read off "
        "its curve through its lengths, seed by seed. Seeds: those that lie within the lengths that were "
        "run; beyond: those that ended better than the baseline's longest run.",
    )


def _saving_row(study: Study, saving: AtCost) -> tuple[str, ...]:
    show = words.COSTS.get(saving.cost, (saving.cost, fmt.count))[1]
    pairs = spent_and_baseline(study, saving)
    return (
        f"{saving.arm} against {saving.against}",
        _cost_name(saving.cost),
        show(words.mean(own for own, _ in pairs)),
        show(words.mean(theirs for _, theirs in pairs)),
        words.share(saving.mean),
        words.interval(saving.ci95, words.share),
        words.times(speed_up(saving)),
        _seeds(saving),
        fmt.count(saving.beyond),
    )


def spent_and_baseline(study: Study, saving: AtCost) -> list[tuple[float, float]]:
    """For each seed with a figure, what the arm spent and what the baseline would have."""
    arms = [arm for arm in study.full if arm.condition == saving.arm]
    own = {cell.seed: cell.costs.get(saving.cost, math.nan) for arm in arms for cell in arm.finished}
    return [
        (own[seed], own[seed] / (1.0 - share))
        for seed, share in zip(saving.seeds, saving.values, strict=False)
        if seed in own and math.isfinite(share) and share < 1.0
    ]


def speed_up(saving: AtCost) -> float:
    """How many times the arm's cost the baseline needs."""
    return 1.0 / (1.0 - saving.mean) if saving.mean < 1.0 else math.nan


def _cost_name(cost: str) -> str:
    return words.COSTS.get(cost, (cost, fmt.count))[0]


def _seeds(each: AtCost) -> str:
    return f"{each.n} of {len(each.values)}"


# --- the rest ---------------------------------------------------------------------------------------------


def failed_and_missing(study: Study) -> Table:
    rows = [
        (
            each.condition,
            words.length(each.length),
            str(each.seed),
            "tuning run" if each.tuning else "run",
            "failed: " + (each.reason.strip() or "no reason is on record"),
        )
        for each in words.failures(study)
    ]
    rows += [
        (arm.condition, words.length(arm.length), str(seed), "run", "has not run yet")
        for arm, seed in words.missing_cells(study)
    ]
    columns = ("condition", "length", "seed", "what", "why")
    return Table("Failed and missing runs", Grid(columns, tuple(rows)), look="prose")


def conditions(study: Study) -> Table:
    """What each condition is in words, and the settings by which it differs from the base."""
    rows = []
    for name in study.conditions:
        arm = next(each for each in study.arms if each.condition == name)
        rows.append((name, arm.about or fmt.NONE, _in_a_line(arm.settings) or "what all share"))
    return Table("Conditions", Grid(("condition", "what it is", "settings"), tuple(rows)), look="prose")


def _in_a_line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings(values))


def growths(study: Study) -> Table:
    rows = [
        (
            arm.condition,
            words.length(arm.length),
            str(cell.seed),
            fmt.count(growth.step),
            f"{fmt.count(growth.depth_before)}→{fmt.count(growth.depth_after)}",
            fmt.loss(growth.loss_before),
            fmt.loss(growth.loss_after),
            words.signed(growth.loss_after - growth.loss_before),
        )
        for arm in study.arms
        for cell in arm.cells
        for growth in cell.growths
    ]
    columns = ("condition", "length", "seed", "step", "layers", "loss before", "after", "jump")
    return Table(f"Growths ({len(rows)})", Grid(columns, tuple(rows)), folded=len(rows) > 12)


def tuning(study: Study) -> Table:
    rates = sorted({rate for each in study.tuning for rate, _ in each.tried if math.isfinite(rate)})
    rows = [
        (
            each.condition,
            *(_tried(dict(each.tried), rate) for rate in rates),
            words.rate(each.chosen) + (", at the edge of the grid" if each.at_edge else ""),
        )
        for each in study.tuning
    ]
    columns = ("condition", *(words.rate(rate) for rate in rates), "chosen")
    return Table(
        "Learning rates tried",
        Grid(columns, tuple(rows)),
        f"{words.metric_words(study).capitalize()} of one tuning run each. A rate chosen at the edge of the "
        "grid means that a better one may lie beyond it: the arm may be better than it looks.",
    )


def _tried(tried: dict[float, float], rate: float) -> str:
    return "" if rate not in tried else fmt.loss(tried[rate])


def measured(study: Study) -> tuple[tuple[str, str], ...]:
    """How it was measured, as pairs."""
    amount, unit = study.budget.get("amount"), str(study.budget.get("unit", ""))
    show = words.COSTS.get(unit, (unit, fmt.count))
    value = float(amount) if isinstance(amount, int | float) else math.nan
    budget = f"{show[1](value)} {show[0]}" if unit != "seconds" else f"{show[1](value)} of training time"
    rows = [
        ("preset", study.preset or fmt.NONE),
        ("budget of every arm", budget),
        ("seeds", ", ".join(map(str, study.seeds)) or fmt.NONE),
        ("lengths, in budgets", ", ".join(map(words.length, study.lengths)) or fmt.NONE),
        ("baselines" if len(study.baselines) > 1 else "baseline", words.joined(study.baselines or ["none"])),
        ("metric", words.metric_words(study)),
        ("evaluation windows, the same for all", fmt.count(study.eval_windows)),
        ("level of the tests", f"{study.alpha:g}" if math.isfinite(study.alpha) else fmt.NONE),
        ("the test that decides", words.TESTS.get(study.test, study.test or fmt.NONE)),
        ("correction", "Holm, over all planned comparisons"),
        ("planned comparisons", _declared(study.declared)),
        ("specification", study.hash or fmt.NONE),
    ]
    factors = ((f"factor {name}", fmt.anything(levels)) for name, levels in study.factors.items())
    return (*rows, *factors, *_shared(study))


_SHARED = {
    "base": "settings of every run",
    "pretrain": "the model that runs begin with, trained by",
    "retrofit": "how it is converted and tuned",
}


def _shared(study: Study) -> Iterable[tuple[str, str]]:
    """What conditions have in common where they do not say otherwise."""
    for part, title in _SHARED.items():
        if isinstance(values := study.shared.get(part), Mapping) and values:
            yield title, _in_a_line(values)


def _declared(pairs: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{arm} against {against}" for arm, against in pairs) or "none"


def key_figures(study: Study) -> tuple[tuple[str, str, str], ...]:
    """The few numbers on top: label, value, note."""
    done = [cell for arm in study.arms for cell in arm.finished]
    against = words.joined(study.baselines) if study.baselines else ""
    total = sum(_planned_seeds(study, arm) for arm in study.arms)
    known = [arm for arm in study.full if math.isfinite(arm.summary.mean)]
    best = min(known, key=lambda arm: arm.summary.mean, default=None)
    seconds = math.fsum(c.costs["seconds"] for c in done if math.isfinite(c.costs["seconds"]))
    processors = dict.fromkeys(cell.processor for cell in done if cell.processor)
    return (
        ("Conditions", str(len(study.conditions)), f"against {against}" if against else ""),
        ("Seeds", str(len(study.seeds)), "the same for every arm"),
        ("Runs", f"{len(done)} of {total}", "finished"),
        (f"Least {words.short_metric(study)}", fmt.loss(best.summary.mean if best else None),
         best.condition if best else ""),
        ("Training time", fmt.duration(seconds), words.joined(processors) if processors else "all runs"),
    )  # fmt: skip
