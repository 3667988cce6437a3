"""The examples run as they stand, and grow."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_callback import PrinterCallback

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    """The functions of an example, which is not a package."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_a_loop_grows_and_learns_on(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, losses = example(name)["main"]()
    assert model.config.num_hidden_layers == 4
    middle = losses[len(losses) // 2]
    assert losses[-1] < middle < losses[0]
    assert "2 -> 4 layers" in capsys.readouterr().out


def test_the_trainer_grows_under_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrinterCallback, "on_log", lambda *args, **kwargs: None)
    result = example("trainer")["main"]()
    assert (result.status, result.depth, result.num_growths) == ("finished", 4, 1)


def test_lightning_grows_and_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    example("lightning_callback")["main"]()
    printed = capsys.readouterr().out
    assert printed.count("step 40: 4 layers") == 2
    assert printed.count("2 -> 4 layers") == 1, "the second run resumed after the growth"


def test_every_example_is_tested_and_runs_as_a_program() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"plain_loop", "accelerate_loop", "trainer", "lightning_callback"}
    for name in names:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert 'if __name__ == "__main__":\n    main()' in text, name
