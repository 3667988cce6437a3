"""How far something is, as it is shown: bars and lines, and how long they say that it still takes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from aiether.cli._progress import phase_progress
from aiether.cli._study_display import StudyDisplay


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_job_that_goes_on_is_not_taken_to_have_done_all_of_it_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("aiether.cli._progress.time.monotonic", clock)
    with phase_progress() as report:
        report("tuning", 0.5)
        clock.now = 120.0
        report("tuning", 0.75)
    assert capsys.readouterr().err == "tuning: 75 %, about 20 s left\n"


def told(terminal: bool) -> str:
    """What a study's display writes of a phase of which it sees now and then how far it is."""
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    display = StudyDisplay(console, clock)
    for second in range(0, 201, 5):
        clock.now = 100.0 + second
        display.preparing("training the base", 0.3 + second // 20 / 20)  # a twentieth in 20 s
    display.close()
    return out.getvalue()


def test_plain_lines_say_how_far_a_phase_is_and_how_long_it_takes() -> None:
    assert told(terminal=False).splitlines() == [
        "training the base",
        "training the base: 45 %, about 3 min 40 s left",
        "training the base: 60 %, about 2 min 40 s left",
        "training the base: 75 %, about 1 min 40 s left",
    ]


def test_a_bar_says_so_on_a_terminal() -> None:
    name, _, bar = told(terminal=True).partition("\n")
    assert name == "training the base"
    assert "80%" in bar
    assert "about 1 min 20 s left" in bar
