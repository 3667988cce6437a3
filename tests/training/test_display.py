"""The displays of a run, on made-up rows and a clock that the tests turn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from rich.console import Console

from aiether.training.display import (
    DisplaySettings,
    Pace,
    PlainDisplay,
    RichDisplay,
    TrainingDisplay,
    open_display,
)

SETTINGS = DisplaySettings(tau_crit=0.5, kappa_crit=0.6, normalised=True, patience=5, max_layers=8)
GROWTH = {
    "event": "growth",
    "step": 500,
    "depth_before": 2,
    "depth_after": 4,
    "reason": "both thresholds reached",
    "plan": {
        "placement": "stack",
        "init": "copy",
        "layers": [{"source": i % 2, "is_new": i > 1} for i in range(4)],
    },
    "loss_before": 3.25,
    "loss_after": 4.75,
    "seconds": 0.4,
}
SUMMARY = {
    "status": "finished",
    "steps": 1000,
    "depth": 4,
    "eval_loss": 2.5,
    "bits_per_byte": 1.1,
    "flops": 3e13,
    "elapsed_s": 95.0,
    "baselines": [{"name": "static", "depth": 4, "steps": 800, "eval_loss": 2.625, "flops": 3e13}],
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def train_row(step: int, depth: int = 2, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "train",
        "step": step,
        "depth": depth,
        "loss": 3.5,
        "grad_norm": 0.9,
        "tokens_per_s": 12_345.0,
    }
    return row | {"learning_rate": 1e-3, "elapsed_s": step * 0.1} | changes


def eval_row(step: int, depth: int = 2, **changes: Any) -> dict[str, Any]:
    row = {"kind": "eval", "step": step, "depth": depth, "eval_loss": 3.4321, "bits_per_byte": 1.5}
    row |= {"tau": 2.9, "kappa": 2.1, "tau_normalised": 0.51, "kappa_normalised": 0.42}
    return row | {"stagnation": 3, "num_snapshots": 9, "elapsed_s": step * 0.1} | changes


def console_of(width: int = 80, terminal: bool = True) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    environment = {"TERM": "xterm-256color" if terminal else "dumb"}
    return Console(
        file=file, width=width, height=40, force_terminal=terminal, color_system=None, _environ=environment
    )


def output_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.TextIOWrapper)
    raw = file.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode()


def drawn(display: RichDisplay, width: int) -> list[str]:
    """The panel as lines of text."""
    console = console_of(width)
    console.print(display.render())
    return output_of(console).splitlines()


# --- which display ------------------------------------------------------------------------------------


def test_a_terminal_gets_the_live_display_and_a_pipe_plain_lines() -> None:
    assert isinstance(open_display(SETTINGS, console_of()), RichDisplay)
    assert isinstance(open_display(SETTINGS, console_of(terminal=False)), PlainDisplay)


def test_a_terminal_that_cannot_show_greek_letters_gets_plain_lines() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert isinstance(open_display(SETTINGS, Console(file=file, force_terminal=True)), PlainDisplay)


def test_settings_take_thresholds_only_from_a_geometric_trigger() -> None:
    config = {"tau_crit": 2.0, "kappa_crit": 0.5, "thresholds": "raw", "pg_patience": 5, "max_layers": 12}
    geometric = DisplaySettings.from_config(config | {"trigger": "geometric"})
    assert geometric == DisplaySettings(tau_crit=2.0, kappa_crit=0.5, patience=5, max_layers=12)
    assert DisplaySettings.from_config(config | {"trigger": "fixed"}) == DisplaySettings(max_layers=12)


# --- the time left ------------------------------------------------------------------------------------


def pace_of(*seen: tuple[int, float, float]) -> Pace:
    pace = Pace()
    for step, train_seconds, wall_seconds in seen:
        pace = pace.observe(step, train_seconds, wall_seconds)
    return pace


def test_time_left_is_unknown_until_a_stage_was_seen_twice() -> None:
    assert Pace().seconds_left(100) is None
    assert pace_of((10, 1.0, 1.0)).seconds_left(100) is None
    assert pace_of((10, 1.0, 1.0), (20, 2.0, 2.0)).seconds_left(100) == pytest.approx(8.0)


def test_time_left_after_a_resume_counts_this_session_alone() -> None:
    """The 500 s of training before the resume, and whatever the clock stood at, have no part in it."""
    pace = pace_of((500, 500.0, 9_000.0), (510, 501.0, 9_001.0))
    assert pace.seconds_left(1000) == pytest.approx(49.0)


def test_time_left_after_a_growth_counts_the_new_depth_alone() -> None:
    pace = pace_of((0, 0.0, 0.0), (100, 10.0, 10.0)).next_stage()
    assert pace.seconds_left(200) is None
    pace = pace.observe(101, 10.5, 10.5).observe(111, 15.5, 15.5)
    assert pace.seconds_left(211) == pytest.approx(50.0)


def test_time_left_holds_the_evaluations_that_are_still_to_come() -> None:
    """Ten steps of 0.1 s and an evaluation of 1 s: 0.2 s a step."""
    pace = pace_of((0, 0.0, 0.0), (10, 1.0, 2.0))
    assert pace.seconds_left(20) == pytest.approx(2.0)


def test_no_time_is_left_at_the_end_or_past_it() -> None:
    assert pace_of((0, 0.0, 0.0), (10, 1.0, 1.0)).seconds_left(10) == 0
    assert pace_of((0, 0.0, 0.0), (10, 1.0, 1.0)).seconds_left(5) == 0


# --- the live display ---------------------------------------------------------------------------------


Open = Callable[..., RichDisplay]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens live displays of a run of 1,000 steps, and gives the terminal back when the test ends."""
    with ExitStack() as stack:

        def open_one(width: int = 80, settings: DisplaySettings = SETTINGS, step: int = 0) -> RichDisplay:
            clock = Clock()
            display = stack.enter_context(RichDisplay(settings, console_of(width), clock))
            display.start(1000, 0, "run")
            for at in range(100, step + 1, 100):
                clock.now = at * 0.1
                display.update(train_row(at))
                display.update(eval_row(at))
            return display

        yield open_one


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_says_everything_in_any_width(opened: Open, width: int) -> None:
    lines = drawn(opened(width, step=200), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for words in (
        "200/1,000  20 %",
        "1 min 20 s left at 2 layers",
        "3.5000",
        "3.4321",
        "12,345",
        "2 of at most 8",
        "0.51, threshold 0.5 reached",
        "0.42, threshold 0.6",
        "3 of 5 evaluations",
    ):
        assert words in text
    assert "0.6 reached" not in text


def test_the_panel_has_no_wrong_numbers_before_the_first_row(opened: Open) -> None:
    display = opened()
    text = "\n".join(drawn(display, 80))
    assert "0/1,000  0 %" in text
    assert "time left: not known yet" in text
    assert text.count("not enough snapshots yet") == 2


def test_missing_and_broken_measurements_are_hyphens(opened: Open) -> None:
    display = opened(step=200)
    display.update(train_row(300, loss=float("nan"), grad_norm=None, tokens_per_s=None))
    display.update(eval_row(300, bits_per_byte=None, tau_normalised=None))
    text = "\n".join(drawn(display, 80))
    assert "nan" not in text.lower()
    assert "not enough snapshots yet" in text


def test_without_a_geometric_trigger_no_threshold_is_shown(opened: Open) -> None:
    display = opened(settings=DisplaySettings(max_layers=8))
    display.update(eval_row(10, tau=None, kappa=None))
    text = "\n".join(drawn(display, 80))
    assert "threshold" not in text
    assert "τ" not in text
    assert "stagnation" not in text


def test_a_growth_makes_the_time_left_unknown_and_the_depth_new(opened: Open) -> None:
    display = opened(step=200)
    display.growth(GROWTH)
    text = "\n".join(drawn(display, 80))
    assert "time left: not known yet" in text
    assert "4 of at most 8" in text
    assert "step 500: grew 2 -> 4 layers in 0.4 s, loss 3.250 -> 4.750" in output_of(display.console)


def test_steps_between_rows_move_the_bar_and_keep_the_numbers(opened: Open) -> None:
    display = opened(step=200)
    display.update({"step": 207, "train_seconds": 20.7})
    text = "\n".join(drawn(display, 80))
    assert "207/1,000" in text
    assert "3.5000" in text


def test_the_terminal_is_given_back_after_an_interrupt() -> None:
    console = console_of()
    with pytest.raises(KeyboardInterrupt):
        _train_until_interrupted(open_display(SETTINGS, console))
    text = output_of(console)
    assert text.rstrip().endswith("stopped at step 10 of 1,000")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again


def _train_until_interrupted(display: TrainingDisplay) -> None:
    with display:
        display.start(1000, 0, "run")
        display.update(train_row(10))
        raise KeyboardInterrupt


def test_a_second_run_starts_from_nothing() -> None:
    with open_display(SETTINGS, console_of()) as display:
        assert isinstance(display, RichDisplay)
        display.start(1000, 0, "grown")
        display.update(train_row(1000))
        display.finish(SUMMARY)
        display.start(800, 0, "static")
        text = "\n".join(drawn(display, 80))
        assert "0/800" in text
        assert "3.5000" not in text
        display.finish(SUMMARY)


# --- plain lines --------------------------------------------------------------------------------------


def plain_lines(tell: Callable[[PlainDisplay, Clock], None]) -> list[str]:
    clock, console = Clock(), console_of(width=40, terminal=False)
    with PlainDisplay(SETTINGS, console, clock) as display:
        display.start(1000, 0, "run")
        tell(display, clock)
        display.finish(SUMMARY)
    return output_of(console).splitlines()


def test_plain_output_is_one_unwrapped_ascii_line_for_each_thing() -> None:
    def tell(display: PlainDisplay, _: Clock) -> None:
        display.message("data: 9.8 MB [of] text")
        display.update(eval_row(500))
        display.growth(GROWTH)

    lines = plain_lines(tell)
    assert lines == [
        "run: 1,000 steps",
        "data: 9.8 MB [of] text",
        "step 500/1000  eval loss 3.4321  1.5000 bits/byte  2 layers  tau 0.51/0.5  kappa 0.42/0.6  "
        "stagnation 3/5",
        "step 500: grew 2 -> 4 layers in 0.4 s, loss 3.250 -> 4.750",
        "  plan: stack, copy: 0-1 +0-1",
        "  why: both thresholds reached",
        "finished: evaluation loss 2.5000, 1.1000 bits/byte, 4 layers, 1,000 steps, 3e+13 FLOPs, "
        "1 min 35 s of training",
        "baseline static: evaluation loss 2.6250, 4 layers, 800 steps, 3e+13 FLOPs",
    ]
    assert all(line.isascii() for line in lines)


def test_plain_training_lines_come_at_most_every_ten_seconds() -> None:
    def tell(display: PlainDisplay, clock: Clock) -> None:
        for step in range(10, 1000, 10):
            clock.now += 1.0
            display.update(train_row(step, elapsed_s=clock.now))

    steps = [line.split()[1] for line in plain_lines(tell) if line.startswith("step ")]
    assert steps == [f"{step}/1000" for step in range(10, 1000, 100)]


def test_growth_without_losses_or_plan_is_still_announced() -> None:
    def tell(display: PlainDisplay, _: Clock) -> None:
        display.growth(
            {"event": "growth", "step": 7, "depth_before": 1, "depth_after": 2, "loss_after": None}
        )

    assert "step 7: grew 1 -> 2 layers" in plain_lines(tell)


def test_preparing_is_one_plain_line_for_each_task() -> None:
    def tell(display: PlainDisplay, _: Clock) -> None:
        for label in ("reading", "tokenizing"):
            for part in range(11):
                display.progress(label, part / 10)

    lines = plain_lines(tell)
    assert lines.count("reading") == lines.count("tokenizing") == 1


def test_long_preparing_tells_how_far_it_is_and_the_time_left() -> None:
    def tell(display: PlainDisplay, clock: Clock) -> None:
        for part in range(101):
            display.progress("tokenizing", part / 100)
            clock.now += 4.0

    lines = plain_lines(tell)
    assert len([line for line in lines if "tokenizing" in line]) == 1 + 400 // 12
    assert any(line.startswith("tokenizing 75 %") and line.endswith("left") for line in lines)
    assert not any("100 %" in line and "left" in line for line in lines)


def test_preparing_is_a_bar_in_a_terminal_until_training_starts() -> None:
    with open_display(SETTINGS, console_of()) as display:
        assert isinstance(display, RichDisplay)
        display.progress("tokenizing", 0.25)
        assert "25 %" in "\n".join(drawn(display, 80))
        display.start(1000, 0, "run")
        assert "0/1,000" in "\n".join(drawn(display, 80))
        display.finish(SUMMARY)


def test_the_end_names_the_report_and_how_to_go_on() -> None:
    console = console_of(terminal=False)
    with PlainDisplay(SETTINGS, console) as display:
        display.finish(
            {"status": "interrupted", "report": "runs/a/report.html", "resume": "aiether train --resume x"}
        )
    lines = output_of(console).splitlines()
    assert lines[0].startswith("interrupted: evaluation loss -")
    assert lines[1:] == ["report: runs/a/report.html", "resume: aiether train --resume x"]
