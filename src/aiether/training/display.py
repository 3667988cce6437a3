"""What a run shows while it trains: a live panel in a terminal, plain lines everywhere else.

The training loop hands over the rows that it also writes to `metrics.jsonl` and `events.jsonl`; nothing here
changes the course of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aiether.training import _format as fmt

Row = Mapping[str, Any]
Clock = Callable[[], float]
PLAIN_INTERVAL_S = 10.0
WIDE = 76  # columns of a terminal that three pairs of label and number fit in


class TrainingDisplay(Protocol):
    """What the training loop tells a display. As a context manager it always gives the terminal back."""

    def start(self, total_steps: int, step: int, title: str) -> None:
        """Training begins or goes on at `step`. May be called again for another run, such as a baseline."""
        ...

    def plan(self, total_steps: int) -> None:
        """The run has another number of steps from now on."""
        ...

    def update(self, row: Row) -> None:
        """A row of `metrics.jsonl`, or just `{"step", "train_seconds"}` between two of them."""
        ...

    def growth(self, event: Row) -> None:
        """A growth, as `events.jsonl` has it."""
        ...

    def message(self, text: str) -> None:
        """A line that stays."""
        ...

    def progress(self, label: str, fraction: float) -> None:
        """Work before training, such as preparing the data: what is done, and which part of it (0 to 1)."""
        ...

    def finish(self, summary: Row) -> None:
        """The end: the contents of `summary.json`, where wanted with `report` and `resume` to be shown."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class DisplaySettings:
    """What the measurements are shown against. None: the run does not look at it."""

    tau_crit: float | None = None
    kappa_crit: float | None = None
    normalised: bool = False
    patience: int | None = None
    max_layers: int | None = None

    @classmethod
    def from_config(cls, config: Row) -> DisplaySettings:
        """From a run's resolved configuration; with thresholds only where the trigger looks at them."""
        normalised, max_layers = config.get("thresholds") == "normalised", config.get("max_layers")
        if config.get("trigger") != "geometric":
            return cls(normalised=normalised, max_layers=max_layers)
        return cls(
            tau_crit=config.get("tau_crit"),
            kappa_crit=config.get("kappa_crit"),
            normalised=normalised,
            patience=config.get("pg_patience"),
            max_layers=max_layers,
        )


def open_display(
    settings: DisplaySettings | None = None, console: Console | None = None, clock: Clock = time.monotonic
) -> TrainingDisplay:
    """The live display where `console` is a terminal that can show it, plain lines otherwise."""
    settings, console = settings or DisplaySettings(), console or Console()
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return (RichDisplay if can_draw else PlainDisplay)(settings, console, clock)


@dataclass(frozen=True)
class Pace:
    """How fast a run goes, from what this session has seen of it. Pure: `observe` returns the next one.

    The time a step takes is that of the current stage alone, since a deeper model is slower. What goes by
    beside the steps (evaluating, saving, growing) is averaged over the whole session.
    """

    stage_start: tuple[int, float] | None = None  # step, training seconds
    session_start: tuple[int, float] | None = None  # step, wall-clock seconds spent beside training
    now: tuple[int, float, float] | None = None  # step, training seconds, wall-clock seconds

    def observe(self, step: int, train_seconds: float, wall_seconds: float) -> Pace:
        """The pace after a measurement; `train_seconds` counts nothing but training, since the run began."""
        return Pace(
            stage_start=self.stage_start or (step, train_seconds),
            session_start=self.session_start or (step, wall_seconds - train_seconds),
            now=(step, train_seconds, wall_seconds),
        )

    def next_stage(self) -> Pace:
        """Another depth: the steps before say nothing about the time of those to come."""
        return replace(self, stage_start=None)

    def seconds_left(self, total_steps: int) -> float | None:
        """Wall-clock seconds to the end if the depth stays; None before a stage's second measurement."""
        if not (self.now and self.stage_start and self.session_start):
            return None
        step, trained, wall = self.now
        stage_steps = step - self.stage_start[0]
        if stage_steps <= 0:
            return None
        beside = max(wall - trained - self.session_start[1], 0.0) / (step - self.session_start[0])
        per_step = (trained - self.stage_start[1]) / stage_steps + beside
        return max(total_steps - step, 0) * per_step


@dataclass
class RunState:
    """All that is known of a run at one moment; the displays only render it."""

    title: str = ""
    total_steps: int = 0
    step: int = 0
    depth: int | None = None
    train: Row = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    def take(self, row: Row, wall_seconds: float) -> None:
        """Takes in a row; a new depth in it begins a new stage."""
        self.step = int(row.get("step", self.step))
        self.set_depth(row.get("depth"))
        if row.get("kind") == "train":
            self.train = row
        elif row.get("kind") == "eval":
            self.evaluation = row
        seconds = row.get("train_seconds", row.get("elapsed_s"))
        if seconds is not None:
            self.pace = self.pace.observe(self.step, float(seconds), wall_seconds)

    def set_depth(self, depth: int | None) -> None:
        if depth is not None and depth != self.depth:
            self.pace = self.pace.next_stage()
            self.depth = int(depth)

    def time_left(self) -> str | None:
        """The time left in words, or None while it cannot be told."""
        seconds = self.pace.seconds_left(self.total_steps)
        at = f" at {layers(self.depth)}" if self.depth is not None else ""
        return None if seconds is None else f"{fmt.duration(seconds)} left{at}"


def layers(depth: int) -> str:
    return f"{depth} layer" if depth == 1 else f"{depth} layers"


def growth_lines(event: Row) -> list[str]:
    """A growth announced: what it did, and why."""
    seconds, reason = event.get("seconds"), event.get("reason")
    took = f" in {seconds:.1f} s" if seconds is not None else ""
    before, after = event.get("loss_before"), event.get("loss_after")
    losses = f", loss {before:.3f} -> {after:.3f}" if before is not None and after is not None else ""
    depths = f"{event['depth_before']} -> {layers(event['depth_after'])}"
    first = f"step {event['step']:,}: grew {depths}{took}{losses}"
    plan = fmt.plan_words(event.get("plan") or {})
    return [
        first,
        *([f"  plan: {plan}"] if plan != fmt.NONE else []),
        *([f"  why: {reason}"] if reason else []),
    ]


def summary_lines(summary: Row) -> list[str]:
    """The end in words: the run, then each baseline, in the same form."""
    return [
        f"{summary.get('status', 'finished')}: {_outcome(summary)}",
        *(f"baseline {each.get('name')}: {_outcome(each)}" for each in summary.get("baselines") or ()),
        *(f"{name}: {summary[name]}" for name in ("report", "resume") if summary.get(name)),
    ]


def _outcome(result: Row) -> str:
    parts = [
        f"evaluation loss {number(result.get('eval_loss'), '.4f')}",
        f"{number(result.get('bits_per_byte'), '.4f')} bits/byte" if result.get("bits_per_byte") else "",
        layers(result["depth"]) if result.get("depth") else "",
        f"{result['steps']:,} steps" if result.get("steps") is not None else "",
        f"{number(result.get('flops'), '.3g')} FLOPs",
        f"{fmt.duration(result.get('elapsed_s'))} of training" if result.get("elapsed_s") is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def number(value: Any, form: str) -> str:
    """A number in a format, or a hyphen for what is missing or not finite."""
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else "-"


class _Display:
    """What both displays share: they keep the progress and print what stays."""

    def __init__(self, settings: DisplaySettings, console: Console, clock: Clock = time.monotonic) -> None:
        self.settings, self.console, self.clock = settings, console, clock
        self.state = RunState()
        self.finished = True
        self._task: tuple[str, float] = ("", 0.0)
        self._task_start = 0.0

    def start(self, total_steps: int, step: int, title: str) -> None:
        self.state = RunState(title=title, total_steps=total_steps, step=step)
        self.finished = False
        went_on = f", from step {step:,}" if step else ""
        self._print(f"{title}: {total_steps:,} steps{went_on}")

    def plan(self, total_steps: int) -> None:
        self.state.total_steps = total_steps

    def update(self, row: Row) -> None:
        self.state.take(row, self.clock())

    def growth(self, event: Row) -> None:
        self.state.set_depth(event.get("depth_after"))
        for index, line in enumerate(growth_lines(event)):
            self._print(line, style="bold green" if index == 0 else "green")

    def message(self, text: str) -> None:
        self._print(text)

    def progress(self, label: str, fraction: float) -> None:
        if label != self._task[0]:
            self._print(label)
        if label != self._task[0] or fraction < self._task[1]:
            self._task_start = self.clock()
        self._task = (label, fraction)

    def _task_words(self) -> str:
        """How far the work before training is, and the time left once that can be told."""
        fraction = self._task[1]
        took = self.clock() - self._task_start
        known = 0.0 < fraction < 1.0 and took >= 1.0
        left = f"  {fmt.duration(took * (1.0 - fraction) / fraction)} left" if known else ""
        return f"{100 * fraction:.0f} %{left}"

    def finish(self, summary: Row) -> None:
        self.finished = True
        for index, line in enumerate(summary_lines(summary)):
            self._print(line, style="bold" if index == 0 else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            self._print(f"stopped at step {self.state.step:,} of {self.state.total_steps:,}")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)


class PlainDisplay(_Display):
    """One line for each evaluation and growth, and one for training every ten seconds: for logs and pipes."""

    _last_line = -math.inf
    _last_part = -math.inf

    def progress(self, label: str, fraction: float) -> None:
        new = label != self._task[0]
        super().progress(label, fraction)
        if new:
            self._last_part = self.clock()
        elif self.clock() - self._last_part >= PLAIN_INTERVAL_S:
            self._last_part = self.clock()
            self._print(f"{label} {self._task_words()}")

    def update(self, row: Row) -> None:
        super().update(row)
        if row.get("kind") == "eval":
            self._print(self._at_step(self._evaluation_words(row)))
        elif row.get("kind") == "train" and self.clock() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = self.clock()
            self._print(self._at_step(self._training_words(row)))

    def _at_step(self, words: list[str]) -> str:
        return f"step {self.state.step}/{self.state.total_steps}  " + "  ".join(words)

    def _training_words(self, row: Row) -> list[str]:
        left = self.state.time_left()
        return [
            f"loss {number(row.get('loss'), '.4f')}",
            f"grad norm {number(row.get('grad_norm'), '.2f')}",
            f"lr {number(row.get('learning_rate'), '.2e')}",
            f"{number(row.get('tokens_per_s'), ',.0f')} tokens/s",
            *([left] if left else []),
        ]

    def _evaluation_words(self, row: Row) -> list[str]:
        suffix = "_normalised" if self.settings.normalised else ""
        limits = {"tau": self.settings.tau_crit, "kappa": self.settings.kappa_crit}
        measures = [
            f"{name} {number(row.get(name + suffix), '.2f')}/{limit:g}"
            for name, limit in limits.items()
            if limit is not None
        ]
        patience = self.settings.patience
        stagnation = [f"stagnation {number(row.get('stagnation'), '.0f')}/{patience}"] if patience else []
        bits = row.get("bits_per_byte")
        return [
            f"eval loss {number(row.get('eval_loss'), '.4f')}",
            *([f"{bits:.4f} bits/byte"] if bits is not None else []),
            *([layers(row["depth"])] if row.get("depth") else []),
            *measures,
            *stagnation,
        ]


class RichDisplay(_Display):
    """A panel at the foot of the terminal, drawn anew four times a second; what stays scrolls above it."""

    def __init__(self, settings: DisplaySettings, console: Console, clock: Clock = time.monotonic) -> None:
        super().__init__(settings, console, clock)
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def start(self, total_steps: int, step: int, title: str) -> None:
        super().start(total_steps, step, title)
        self._live.start()

    def progress(self, label: str, fraction: float) -> None:
        super().progress(label, fraction)
        self._live.start()

    def finish(self, summary: Row) -> None:
        self._live.stop()
        super().finish(summary)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        super().__exit__(kind, error, trace)

    def render(self) -> RenderableType:
        """The panel as it stands now; a single bar while there is only preparing to show."""
        if self.finished:
            return Padding(_bar(self._task[1], 1.0, self._task_words()), (0, 1))
        return Padding(
            Group(self._progress(), Text(), self._numbers(), Text(), self._geometry()), (1, 1, 0, 1)
        )

    def _progress(self) -> RenderableType:
        state = self.state
        share = 100 * state.step / state.total_steps if state.total_steps else 0.0
        words = f"{state.step:,}/{state.total_steps:,}  {share:.0f} %"
        left = Text(state.time_left() or "time left: not known yet", style="dim")
        return Group(_bar(state.step, max(state.total_steps, 1), words), left)

    def _numbers(self) -> RenderableType:
        train, evaluation = self.state.train, self.state.evaluation
        cells = [
            ("loss", number(train.get("loss"), ".4f")),
            ("eval loss", number(evaluation.get("eval_loss"), ".4f")),
            ("bits/byte", number(evaluation.get("bits_per_byte"), ".4f")),
            ("tokens/s", number(train.get("tokens_per_s"), ",.0f")),
            ("grad norm", number(train.get("grad_norm"), ".2f")),
            ("learning rate", number(train.get("learning_rate"), ".2e")),
        ]
        table = Table.grid(expand=True, padding=(0, 2, 0, 0))
        columns = 3 if self.console.width >= WIDE else 2
        for _ in range(columns):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True, ratio=1)
        for first in range(0, len(cells), columns):
            table.add_row(*(part for cell in cells[first : first + columns] for part in cell))
        return table

    def _geometry(self) -> RenderableType:
        settings, evaluation = self.settings, self.state.evaluation
        suffix, name = ("_normalised", " normalised") if settings.normalised else ("", "")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True, min_width=12)
        table.add_column(no_wrap=True, width=24 if self.console.width >= WIDE else 14)
        table.add_column(no_wrap=True)
        table.add_row("layers", *self._depth_cells())
        for symbol, key, limit in (("τ", "tau", settings.tau_crit), ("κ", "kappa", settings.kappa_crit)):
            value = evaluation.get(key + suffix)
            if limit is not None or value is not None:
                table.add_row(symbol + name, *_gauge(value, limit))
        if settings.patience:
            table.add_row("stagnation", *_counter(evaluation.get("stagnation"), settings.patience))
        return table

    def _depth_cells(self) -> tuple[RenderableType, RenderableType]:
        depth, most = self.state.depth, self.settings.max_layers
        if depth is None or not most or depth > most:
            return Text(), Text(number(depth, ".0f"))
        bar = ProgressBar(total=most, completed=depth, complete_style="cyan", finished_style="cyan")
        return bar, Text(f"{depth} of at most {most}")


def _bar(completed: float, total: float, words: str) -> Table:
    bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    bar.add_row(ProgressBar(total=total, completed=completed), Text(words))
    return bar


def _gauge(value: float | None, limit: float | None) -> tuple[RenderableType, RenderableType]:
    """A bar that is full at the threshold, and the value in words."""
    if value is None:
        return Text(), Text("not enough snapshots yet", style="dim")
    if limit is None:
        return Text(), Text(f"{value:.2f}")
    met = value >= limit
    bar = ProgressBar(
        total=max(limit, 1e-9), completed=min(max(value, 0.0), limit),
        complete_style="yellow", finished_style="green",
    )  # fmt: skip
    words = f"{value:.2f}, threshold {limit:g}" + (" reached" if met else "")
    return bar, Text(words, style="green" if met else "")


def _counter(count: int | None, patience: int) -> tuple[RenderableType, RenderableType]:
    bar = ProgressBar(
        total=patience, completed=min(count or 0, patience),
        complete_style="yellow", finished_style="green",
    )  # fmt: skip
    return bar, Text(f"{number(count, '.0f')} of {patience} evaluations")
