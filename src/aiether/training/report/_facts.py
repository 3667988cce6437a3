"""What the report says in words and tables: pure functions from a run to plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiether.training import _format as fmt
from aiether.training.report.axes import depths
from aiether.training.report.run_records import Row, Run, as_number
from aiether.training.report.series import Comparison, compare, costs_to_target
from aiether.training.report.tables import Grid


def headline(run: Run) -> str:
    """What the run was, in one sentence."""
    first, last = _first_depth(run), run.latest("depth")
    if first is None or last is None:
        return "Nothing has been recorded yet."
    if run.growths:
        times = len(run.growths)
        how_often = {1: "once", 2: "twice"}.get(times, f"{times} times")
        body = f"Grew {how_often}, from {first:.0f} to {_layers(last)}, in {run.last_step:,} steps."
    else:
        body = f"Trained {_layers(last)} for {run.last_step:,} steps."
        body += " Its growths are not on record." if _lost_events(run) else " It did not grow."
    return body


def _lost_events(run: Run) -> bool:
    return any(file == "events.jsonl" for file, _ in run.gaps)


def _layers(depth: float) -> str:
    return f"{depth:.0f}\N{NO-BREAK SPACE}{'layer' if depth == 1 else 'layers'}"


def status(run: Run) -> str | None:
    """A warning when the run has not come to its end; None when it has."""
    state = "interrupted" if run.summary is None else str(run.summary.get("status", "finished"))
    if state == "finished":
        return None
    return f"Not finished ({state}): this is what was recorded up to step {run.last_step:,}."


def gaps(run: Run) -> tuple[str, ...]:
    """What is missing in the records of the run and its baselines, a sentence a gap."""
    found = [f"{file} of {run.name}: rows after step {step:,} are missing" for file, step in run.gaps]
    if status(run) is None and as_number((run.summary or {}).get("steps")) > run.last_step:
        found.append(f"metrics.jsonl of {run.name}: rows after step {run.last_step:,} are missing")
    own = tuple(f"{text}. Figures and tables here lack them." for text in dict.fromkeys(found))
    return own + tuple(text for baseline in run.baselines for text in gaps(baseline))


def verdicts(run: Run) -> tuple[str, ...]:
    """Each baseline against the run, at equal compute and at equal loss, whichever of the two wins."""
    return tuple(
        sentence
        for baseline in run.baselines
        if (comparison := compare(run, baseline))
        for sentence in _verdict(comparison, baseline)
    )


def _verdict(comparison: Comparison, baseline: Run) -> tuple[str, ...]:
    depth = baseline.latest("depth")
    other = f"the {comparison.name} model" + (f" of {_layers(depth)}" if depth else "")
    difference = comparison.difference
    if abs(difference) < 0.0005:
        relation = "level with"
    else:
        relation = f"{abs(difference):.3f} nats {'below' if difference < 0 else 'above'}"
    at_equal_compute = (
        f"At {fmt.scientific(comparison.flops)} FLOPs the evaluation loss is {fmt.loss(comparison.loss)}, "
        f"{relation} {other} ({fmt.loss(comparison.baseline_loss)})."
    )
    if not all(map(math.isfinite, (comparison.flops_to_target, comparison.baseline_flops_to_target))):
        return (at_equal_compute,)
    saving = comparison.saving
    return (
        at_equal_compute,
        f"A loss of {fmt.loss(comparison.target)} took {fmt.scientific(comparison.flops_to_target)} FLOPs, "
        f"{fmt.percent(abs(saving))} {'less' if saving > 0 else 'more'} than {other} "
        f"({fmt.scientific(comparison.baseline_flops_to_target)}).",
    )


def key_figures(run: Run) -> tuple[tuple[str, str, str], ...]:
    """The few numbers on top of the page: label, value, and a note in small print."""
    loss, bits = run.latest_loss, latest_bits(run)
    least = run.evals.column("eval_loss")
    best = float(min((value for value in least if math.isfinite(value)), default=math.nan))
    first, last = _first_depth(run), run.latest("depth")
    tokens, seconds = run.latest("tokens"), run.latest("elapsed_s")
    speed = f"{fmt.count(tokens / seconds)} tokens/s" if tokens and seconds else ""
    bits_note = f"{bits:.3f} bits per byte" if bits is not None else f"least {fmt.loss(best)}"
    depth_note = f"from {first:.0f}" if first is not None and run.growths else "constant"
    return (
        ("Evaluation loss", fmt.loss(loss), bits_note),
        ("Perplexity", f"{math.exp(loss):.4g}" if loss is not None and loss < 50 else fmt.NONE, "per token"),
        ("Layers", f"{last:.0f}" if last is not None else fmt.NONE, depth_note),
        ("Compute", fmt.scientific(run.latest("flops")), "FLOPs, head included"),
        ("Training time", fmt.duration(seconds), speed),
        ("Tokens", fmt.count(tokens), f"{run.last_step:,} steps"),
    )


def latest_bits(run: Run) -> float | None:
    value = as_number((run.summary or {}).get("bits_per_byte"))
    return value if math.isfinite(value) else run.evals.last("bits_per_byte")


def _first_depth(run: Run) -> float | None:
    if run.growths:
        return as_number(run.growths[0].get("depth_before"))
    depths_seen = [
        row["depth"] for table in (run.train, run.evals) for row in table.rows[:1] if "depth" in row
    ]
    return float(min(depths_seen)) if depths_seen else None


def outcome_table(run: Run) -> Grid:
    """The run and its baselines, each where it ended."""
    runs = (run, *run.baselines)
    rows: tuple[tuple[str, Callable[[Run], str]], ...] = (
        ("evaluation loss", lambda each: fmt.loss(each.latest_loss)),
        ("layers", lambda each: fmt.count(each.latest("depth"))),
        ("steps", lambda each: fmt.count(each.last_step)),
        ("tokens", lambda each: fmt.count(each.latest("tokens"))),
        ("FLOPs", lambda each: fmt.scientific(each.latest("flops"))),
        ("training time", lambda each: fmt.duration(each.latest("elapsed_s"))),
    )
    return Grid(
        ("at the end", "this run", *(baseline.name for baseline in run.baselines)),
        tuple((name, *(show(each) for each in runs)) for name, show in rows),
    )


_BUDGETS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step": ("steps", fmt.count),
    "tokens": ("tokens", fmt.count),
    "flops": ("FLOPs", fmt.scientific),
    "elapsed_s": ("training time", fmt.duration),
}


def cost_tables(run: Run) -> tuple[Grid, ...]:
    """For each baseline, what the least loss that both reach took, by everything it can be counted in."""
    tables: list[Grid] = []
    for baseline in run.baselines:
        target, spent = costs_to_target(run, baseline, tuple(_BUDGETS))
        if spent:
            rows = tuple(
                (name, show(spent[column].run), show(spent[column].baseline), _saved(spent[column].saving))
                for column, (name, show) in _BUDGETS.items()
                if column in spent
            )
            tables.append(
                Grid((f"to a loss of {fmt.loss(target)}", "this run", baseline.name, "saved"), rows)
            )
    return tuple(tables)


def _saved(share: float) -> str:
    return fmt.percent(share).replace("-", "−")


def growth_table(run: Run) -> Grid:
    """One row a growth."""
    return Grid(
        ("step", "layers", "loss before", "after", "jump", "plan", "why"),
        tuple(
            (
                f"{int(event['step']):,}",
                depths(event),
                fmt.loss(as_number(event.get("loss_before"))),
                fmt.loss(as_number(event.get("loss_after"))),
                _jump(event),
                fmt.plan_words(event.get("plan") or {}),
                str(event.get("reason") or fmt.NONE),
            )
            for event in run.growths
        ),
    )


def _jump(event: Row) -> str:
    jump = as_number(event.get("loss_after")) - as_number(event.get("loss_before"))
    return fmt.signed(jump) if math.isfinite(jump) else fmt.NONE


def tensor_tables(run: Run) -> tuple[tuple[str, Grid], ...]:
    """For each growth that measured its tensors: a title, and one row a tensor."""
    return tuple(
        (f"Step {int(event['step']):,}, {depths(event)} layers: {len(event['tensors'])} tensors", grid)
        for event in run.growths
        if event.get("tensors") and (grid := _tensor_grid(event["tensors"]))
    )


def _tensor_grid(tensors: Mapping[str, Mapping[str, Any]]) -> Grid:
    columns = tuple(dict.fromkeys(name for metrics in tensors.values() for name in metrics))
    rows = tuple(
        (tensor, *(fmt.anything(metrics.get(column)) for column in columns))
        for tensor, metrics in tensors.items()
    )
    return Grid(("tensor", *(column.replace("_", " ") for column in columns)), rows)


def event_list(run: Run) -> tuple[tuple[str, str], ...]:
    """What happened, by step, in words."""
    return tuple((f"step {int(event.get('step') or 0):,}", _event_words(event)) for event in run.events)


def _event_words(event: Row) -> str:
    kind = str(event.get("event", "?"))
    if kind == "growth":
        seconds = as_number(event.get("seconds"))
        took = f", which took {seconds:.2g} s" if math.isfinite(seconds) else ""
        return f"grew {depths(event)} layers{took}"
    if kind == "phase":
        trainable = event.get("trainable")
        return "all layers train" if trainable == "all" else f"only layers {fmt.anything(trainable)} train"
    details = ", ".join(
        f"{key.replace('_', ' ')} {fmt.anything(value)}"
        for key, value in event.items()
        if key not in ("event", "step") and isinstance(value, str | int | float)
    )
    return f"{kind}: {details}" if details else kind


@dataclass(frozen=True)
class Token:
    """A piece of a text and what it cost, as shares from 0 to 1 that are shown as shades.

    Attributes
    ----------
    layers: of the routed layers, those that processed it; `thought`: of the latent iterations, those it took
        beyond the first. None where the model has none.
    about: the same in words.
    """

    piece: str
    layers: float | None
    thought: float | None
    about: str


@dataclass(frozen=True)
class Sample:
    """A text as it is shown: whose it is, and the prompt apart from what the model added."""

    title: str
    prompt: str
    text: str
    trace: tuple[Token, ...] = ()


MOST_SAMPLES = 6
"""So many of a run's samples are shown at once: the first and the newest."""


def samples(run: Run) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """A sample per stage in their order, then each baseline's last: those shown at once, those folded."""
    own = tuple(_sample(row) for row in run.samples)
    theirs = tuple(_sample(each.samples[-1], each.name) for each in run.baselines if each.samples)
    if len(own) <= MOST_SAMPLES:
        return own + theirs, ()
    newest = len(own) - MOST_SAMPLES + 1
    return own[:1] + own[newest:] + theirs, own[1:newest]


def _sample(row: Row, name: str = "") -> Sample:
    depth, step = row.get("depth"), int(row.get("step") or 0)
    title = ", ".join(filter(None, (name, _layers(depth) if depth else "", f"step {step:,}")))
    prompt, text = _split_prompt(str(row.get("prompt") or ""), str(row.get("text") or ""))
    return Sample(title, prompt, text, _tokens(row.get("trace") or {}))


def _tokens(trace: Row) -> tuple[Token, ...]:
    """What was recorded of a text's tokens (`Sampler.trace`)."""
    layers, processed, iterations = (trace.get(name) or [] for name in ("layers", "processed", "iterations"))
    most = max(iterations, default=1)
    found = []
    for place, piece in enumerate(trace.get("pieces") or []):
        own = [layer for layer, row in zip(layers, processed, strict=True) if row[place]]
        words = [f"layers {', '.join(map(str, own)) or 'none'}"] if layers else []
        words += [f"{iterations[place]} of {most} iterations"] if iterations else []
        thought = (iterations[place] - 1) / max(1, most - 1) if iterations else None
        found.append(Token(str(piece), len(own) / len(layers) if layers else None, thought, "; ".join(words)))
    return tuple(found)


def _split_prompt(prompt: str, text: str) -> tuple[str, str]:
    """The prompt once, whether or not the recorded text begins with it."""
    return prompt, text.removeprefix(prompt)
