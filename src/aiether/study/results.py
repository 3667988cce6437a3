"""results.json: everything that a study found, computed from the records of its runs and nothing else."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiether.evaluation import mfu
from aiether.training.config import TrainConfig

from .arms import Cell, cell_config, cells, lengths_of
from .curve import Point, cost_at, curve_of, loss_at
from .spec import StudySpec, combination, plain
from .statistics import compare_planned, factorial, mean_interval, savings_verdict, summarise

Row = dict[str, Any]
COSTS = ("tokens", "flops", "seconds")
SHARED = ("base", "pretrain", "retrofit")
"""Parts of a specification that every condition has, unless it says otherwise."""


def collect(
    spec: StudySpec,
    study_dir: Path,
    facts: Mapping[str, Row],
    chosen: Mapping[str, float],
    failures: Mapping[Cell, str],
    command: str,
) -> Row:
    """The content of results.json; equal records give an equal one but for what clocks measured.

    `facts` are those of each condition's models (`Arm.facts`), `chosen` the tuned learning rates.
    """
    configs = {name: cell_config(spec, Cell(name, 1.0, spec.seeds[0])) for name in spec.all_conditions()}
    entries = arm_entries(spec, study_dir, configs, facts, chosen, failures)
    values = {
        name: {row["seed"]: row["metric"] for row in entry["cells"] if row["metric"] is not None}
        for name in configs
        for entry in entries
        if entry["condition"] == name and entry["length"] == 1.0
    }
    return {
        "study": _study(spec, command),
        "environment": environment_of(study_dir, cells(spec, chosen)),
        "arms": entries,
        "tuning": tuning_entries(spec, study_dir, chosen),
        "comparisons": comparison_entries(spec, values),
        "factorial": factorial_entries(spec, values),
        **cost_entries(spec, entries),
        "failures": failure_entries(entries, failures),
    }


def failure_entries(entries: Sequence[Row], failures: Mapping[Cell, str]) -> list[Row]:
    """Runs without a result that counts: of tuning, then of the arms, those that broke a claim among them."""
    found = [
        {"condition": cell.condition, "length": cell.length, "seed": cell.seed, "lr": cell.lr}
        | {"tuning": True, "reason": reason, "folder": cell.folder}
        for cell, reason in failures.items()
        if cell.tuning
    ]
    return found + [
        {"condition": entry["condition"], "length": entry["length"], "seed": row["seed"], "lr": entry["lr"]}
        | {"tuning": False, "reason": row["reason"], "folder": row["folder"]}
        for entry in entries
        for row in entry["cells"]
        if row["status"] == "failed"
    ]


def _study(spec: StudySpec, command: str) -> Row:
    return {
        "name": spec.name,
        "question": spec.question,
        "preset": spec.preset,
        "baseline": spec.baseline,
        "baselines": list(spec.baselines()),
        "metric": spec.metric,
        "judged": spec.judged,
        "test": spec.test,
        "alpha": spec.alpha,
        "budget": {"unit": spec.budget_unit, "amount": spec.budget},
        "seeds": list(spec.seeds),
        "lengths": sorted(spec.lengths),
        "eval_windows": spec.eval_windows,
        "declared": [asdict(each) for each in spec.planned()],
        "factors": {name: list(levels) for name, levels in spec.factors.items()},
        "shared": {name: value for name, value in plain(spec).items() if name in SHARED},
        "command": command,
        "hash": spec_hash(spec),
    }


def spec_hash(spec: StudySpec) -> str:
    """A short mark of a specification: equal ones have equal marks."""
    return hashlib.sha256(json.dumps(plain(spec), sort_keys=True).encode()).hexdigest()[:12]


def environment_of(study_dir: Path, wanted: Sequence[Cell]) -> Row:
    """What the runs say of where they ran: commit, versions and machine; several where they differ."""
    paths = [study_dir / cell.folder / "environment.json" for cell in wanted]
    read = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    def all_of(key: str) -> Any:
        values = sorted({str(each[key]) for each in read if each.get(key) is not None})
        return ", ".join(values) if values else None

    tuned_on = sorted({each["tuned_on"]["fingerprint"] for each in read if each.get("tuned_on")})
    return {
        "commit": all_of("commit"),
        "source_modified": all_of("source_modified"),
        "versions": {name: all_of(name) for name in ("aiether", "python", "torch", "transformers")},
        "machine": {name: all_of(name) for name in ("processor", "platform", "threads")},
        "data": sorted({each["data"]["fingerprint"] for each in read}),
        **({"tuned_on": tuned_on} if tuned_on else {}),
    }


def without_timings(value: Any) -> Any:
    """Results but for what clocks measured."""
    if isinstance(value, dict):
        return {key: without_timings(each) for key, each in value.items() if key != "timings"}
    if isinstance(value, list):
        kept = (each for each in value if not (isinstance(each, dict) and each.get("cost") == "seconds"))
        return [without_timings(each) for each in kept]
    return value


# -- arms -------------------------------------------------------------------------------------------------


def arm_entries(
    spec: StudySpec,
    study_dir: Path,
    configs: Mapping[str, TrainConfig],
    facts: Mapping[str, Row],
    chosen: Mapping[str, float],
    failures: Mapping[Cell, str],
) -> list[Row]:
    """One entry for each condition and length, with every one of its runs."""
    members: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells(spec, chosen):
        members.setdefault((cell.condition, cell.length), []).append(cell)
    conditions = spec.all_conditions()
    entries = []
    for name, config in configs.items():
        for length in lengths_of(spec, name):
            rows = [cell_entry(spec, study_dir, cell, config, failures) for cell in members[name, length]]
            if conditions[name].claims.about_the_end:
                rows = [_as_claimed(row, facts[name]["planned_depth"]) for row in rows]
            known = [row["metric"] for row in rows if row["metric"] is not None]
            entries.append(
                {
                    "condition": name,
                    "length": length,
                    "about": conditions[name].about,
                    "settings": {**conditions[name].settings, **conditions[name].retrofit},
                    "lr": chosen.get(name) if spec.tuning is not None else config.lr,
                    **_models(facts[name], rows),
                    "cells": rows,
                    "summary": asdict(summarise(known)) if known else None,
                }
            )
    return entries


def cell_entry(
    spec: StudySpec, study_dir: Path, cell: Cell, config: TrainConfig, failures: Mapping[Cell, str]
) -> Row:
    """What one run's records say."""
    row: Row = {"seed": cell.seed, "status": "missing", "reason": None, "folder": cell.folder}
    row |= dict.fromkeys(("metric", "eval_loss", "bits_per_byte", "steps", "tokens", "flops", "depth"))
    row |= {"growths": [], "timings": None}
    if cell in failures:
        return row | {"status": "failed", "reason": failures[cell]}
    folder = study_dir / cell.folder
    last = deciding_evaluation(spec, folder)
    if last is None or not (folder / "result.json").is_file():
        return row
    growths = [event for event in read_rows(folder / "events.jsonl") if event["event"] == "growth"]
    keys = ("step", "depth_before", "depth_after", "loss_before", "loss_after")
    return row | {
        "status": "finished",
        "metric": last[spec.metric],
        "eval_loss": last["eval_loss"],
        "bits_per_byte": last["bits_per_byte"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "flops": last["flops"],
        "depth": last["depth"],
        "growths": [{key: growth.get(key) for key in keys} for growth in growths],
        **_beside(folder, last),
        "timings": _timings(folder, last, config.bf16),
    }


def _beside(folder: Path, last: Row) -> Row:
    """What else was found: how much an adaptive model computed, and the terms of toroidal layers."""
    plain = ("eval_loss", "eval_seconds", "eval_steps_per_s")
    figures = {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and name not in plain and value is not None
    }
    path = folder / "retrofit.json"
    terms = json.loads(path.read_text(encoding="utf-8"))["terms"] if path.is_file() else []
    return {name: found for name, found in (("figures", figures), ("terms", terms)) if found}


def _models(facts: Row, rows: Sequence[Row]) -> Row:
    """Depth and size of an arm's models: at the start, as planned, and as the deepest of its runs ended."""
    ended = [row["depth"] for row in rows if row["depth"] is not None]
    depths = {"start": facts["start_depth"], "end": max(ended, default=facts["planned_depth"])}
    by_depth = facts["by_depth"]
    return {
        "depth": depths | {"planned": facts["planned_depth"], "ended": sorted(ended)},
        "parameters": {name: by_depth[str(depth)]["parameters"] for name, depth in depths.items()},
        "flops_per_token": {name: by_depth[str(depth)]["flops_per_token"] for name, depth in depths.items()},
    }


def _as_claimed(row: Row, depth: int) -> Row:
    """A run that did not become what its condition claims to be is no run of that condition."""
    if row["status"] != "finished" or row["depth"] == depth:
        return row
    reason = f"it ended with {row['depth']} layers, and the condition claims {depth}"
    return row | {"status": "failed", "reason": reason, "metric": None}


def _timings(folder: Path, last: Row, bf16: bool) -> Row:
    seconds = last["elapsed_s"]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "tokens_per_s": last["tokens"] / seconds if seconds else None,
        "processor": environment["processor"],
        "mfu": mfu(last["flops"] / seconds, environment["processor"]) if bf16 and seconds else None,
    }


def deciding_evaluation(spec: StudySpec, folder: Path) -> Row | None:
    """The evaluation by which a run is judged; None before the first one."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"]
    if spec.judged == "best" and rows:
        return min(rows, key=lambda row: row[spec.metric])
    return rows[-1] if rows else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # after the last newline: nothing, or half a row


# -- comparisons ------------------------------------------------------------------------------------------


def comparison_entries(spec: StudySpec, values: Mapping[str, Mapping[int, float]]) -> list[Row]:
    """The planned comparisons, blocked by seed: a seed that one arm lacks is left out of that comparison."""
    pairs = {(each.arm, each.against): each for each in spec.planned()}
    shared = {pair: _seeds_of_both(spec, values, *pair) for pair in pairs}
    found = compare_planned(
        {
            " - ".join(pair): [values[pair[0]][seed] - values[pair[1]][seed] for seed in seeds]
            for pair, seeds in shared.items()
        },
        alpha=spec.alpha,
        test=spec.test,
    )
    return [
        {"arm": arm, "against": against, "planned": True, "seeds": shared[arm, against]}
        | {"differences": [values[arm][seed] - values[against][seed] for seed in shared[arm, against]]}
        | asdict(found[f"{arm} - {against}"])
        for arm, against in pairs
    ]


def _seeds_of_both(
    spec: StudySpec, values: Mapping[str, Mapping[int, float]], arm: str, against: str
) -> list[int]:
    return [seed for seed in spec.seeds if seed in values[arm] and seed in values[against]]


def factorial_entries(spec: StudySpec, values: Mapping[str, Mapping[int, float]]) -> list[Row] | None:
    """Main effects and interactions of a factorial study; None without factors."""
    if not spec.factors:
        return None
    factors = list(spec.factors)
    cells_by_levels = {levels: values[combination(levels, factors)] for levels in _level_tuples(spec.factors)}
    effects = factorial(cells_by_levels, factors, alpha=spec.alpha, test=spec.test)
    return [asdict(effect) for effect in effects]


def _level_tuples(factors: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for levels in factors.values():
        found = [(*before, level) for before in found for level in levels]
    return found


# -- cost -------------------------------------------------------------------------------------------------


def cost_entries(spec: StudySpec, entries: Sequence[Row]) -> dict[str, list[Row]]:
    """Every arm beside the baseline's own cost-quality curve: at equal cost, and at equal loss."""
    found: dict[str, list[Row]] = {"equal_cost": [], "savings": []}
    pairs = [(entry, spec.baseline_of(entry["condition"])) for entry in entries]
    for cost in COSTS:
        for entry, baseline in pairs:
            curves = {} if baseline is None else baseline_curves(entries, baseline, cost)
            if not curves:
                continue
            rows = [row for row in entry["cells"] if row["status"] == "finished"]
            names = {"arm": entry["condition"], "against": baseline, "cost": cost}
            seeds = [row["seed"] for row in rows]
            gaps = [_gap(curves.get(row["seed"], ()), row, cost) for row in rows]
            shares = [_saving(curves.get(row["seed"], ()), row, cost) for row in rows]
            bounds = [_least_saving(curves.get(row["seed"], ()), row, cost) for row in rows]
            beyond = sum(bound is not None for bound in bounds)
            told = shares if not beyond else []  # the seeds that did best would be missing from a mean
            found["equal_cost"].append(
                names
                | {"seeds": seeds, "differences": gaps}
                | _interval(gaps)
                | {"verdict": _gap_words(gaps, cost)}
            )
            found["savings"].append(
                names
                | {"seeds": seeds, "savings": shares, "beyond": beyond}
                | _interval(told)
                | {"verdict": _saving_words(shares, bounds, cost)}
            )
    return found


def baseline_curves(entries: Sequence[Row], baseline: str, cost: str) -> dict[int, tuple[Point, ...]]:
    """The curve of a baseline for each seed that has one."""
    points: dict[int, list[Point]] = {}
    for entry in entries:
        for row in entry["cells"] if entry["condition"] == baseline else ():
            if row["status"] == "finished":
                points.setdefault(row["seed"], []).append(Point(cost_of(row, cost), row["metric"]))
    return {seed: curve for seed, found in points.items() if (curve := curve_of(found))}


def cost_of(row: Row, cost: str) -> float:
    """What a run spent: tokens, FLOPs or training seconds."""
    return row["timings"]["seconds"] if cost == "seconds" else row[cost]


def _gap(curve: tuple[Point, ...], row: Row, cost: str) -> float | None:
    at_cost = loss_at(curve, cost_of(row, cost))
    return None if at_cost is None else row["metric"] - at_cost


def _saving(curve: tuple[Point, ...], row: Row, cost: str) -> float | None:
    would = cost_at(curve, row["metric"])
    return None if would is None else 1.0 - cost_of(row, cost) / would


def _least_saving(curve: tuple[Point, ...], row: Row, cost: str) -> float | None:
    """What a run saved at least that is better than every one of the curve; None for another."""
    if not curve or row["metric"] >= min(point.loss for point in curve):
        return None
    return 1.0 - cost_of(row, cost) / curve[-1].cost


def _interval(values: Sequence[float | None]) -> Row:
    found = mean_interval(values)
    return {"n": found.n, "mean": found.mean, "ci95": found.ci95}


_UNITS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


def _gap_words(gaps: Sequence[float | None], cost: str) -> str:
    known = [gap for gap in gaps if gap is not None]
    if not known:
        return f"no comparison at equal {_UNITS[cost]}: the runs lie outside the baseline's lengths"
    mean = statistics.fmean(known)
    side = "lower" if mean < 0 else "higher"
    return f"{side} by {abs(mean):.3f} at equal {_UNITS[cost]}{_spread(known, '.3f')}{_left_out(gaps)}"


def _saving_words(shares: Sequence[float | None], bounds: Sequence[float | None], cost: str) -> str:
    beyond = [bound for bound in bounds if bound is not None]
    if not beyond:
        return savings_verdict(shares, _UNITS[cost])
    known = [*beyond, *(share for share in shares if share is not None)]
    least = statistics.fmean(known)
    words = (
        f"at least {least:.0%} fewer {_UNITS[cost]}"
        if least > 0
        else f"no saving shown: at most {-least:.0%} more {_UNITS[cost]}"
    )
    better = f"{len(beyond)} of {len(shares)} seeds better than the baseline's longest run"
    return f"{words} ({better})"


def _spread(known: Sequence[float], form: str) -> str:
    if len(known) < 2:
        return " (one seed)"
    interval = summarise(known).ci95
    assert interval is not None
    return f" (95 %: {interval[0]:{form}} to {interval[1]:{form}}, {len(known)} seeds)"


def _left_out(values: Sequence[float | None]) -> str:
    missing = sum(value is None for value in values)
    return f"; {missing} seed{'s' if missing > 1 else ''} outside the baseline's curve" if missing else ""


# -- tuning -----------------------------------------------------------------------------------------------


def tuning_entries(spec: StudySpec, study_dir: Path, chosen: Mapping[str, float]) -> list[Row]:
    """What was tried for each condition, and what it chose."""
    if spec.tuning is None:
        return []
    entries = []
    for name in spec.all_conditions():
        tried = [
            {"lr": lr, "metric": metric_of(spec, study_dir, cell), "folder": cell.folder}
            for lr in sorted(spec.tuning.lr)
            for cell in (Cell(name, 1.0, spec.tuning.seed, lr, tuning=True),)
        ]
        rates = sorted(spec.tuning.lr)
        entries.append(
            {"condition": name, "tried": tried, "chosen": chosen.get(name)}
            | {"at_edge": chosen.get(name) in (rates[0], rates[-1])}
        )
    return entries


def metric_of(spec: StudySpec, study_dir: Path, cell: Cell) -> float | None:
    """The primary metric of a finished run; None for another."""
    last = deciding_evaluation(spec, study_dir / cell.folder)
    done = last is not None and (study_dir / cell.folder / "result.json").is_file()
    return last[spec.metric] if last is not None and done else None


def choose_rates(spec: StudySpec, study_dir: Path) -> dict[str, float]:
    """Each condition's best learning rate on the tuning seed; none where all of its runs failed."""
    chosen = {}
    for entry in tuning_entries(spec, study_dir, {}):
        tried = [(row["metric"], row["lr"]) for row in entry["tried"] if row["metric"] is not None]
        if tried:
            chosen[entry["condition"]] = min(tried)[1]
    return chosen
