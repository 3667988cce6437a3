"""`aiether triggers` on the record of a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiether.training.config import resolve
from aiether.training.run import train
from aiether.training.trigger_table import trigger_table

from .corpus import write_corpus

pytestmark = pytest.mark.usefixtures("without_report")

SETTINGS: dict[str, Any] = {
    "n_layer": 1,
    "max_layers": 4,
    "n_head": 2,
    "n_embd": 16,
    "context_length": 16,
    "vocab_size": 300,
    "max_steps": 40,
    "batch_size": 2,
    "eval_interval_steps": 4,
    "eval_batches": 1,
    "collect_interval_steps": 2,
    "history_window_size": 5,
    "warmup_steps": 8,
    "pg_patience": 2,
    "pg_threshold": 0.9,
    "growth_fractions": (0.3, 0.6),
    "device": "cpu",
}


def recorded(tmp_path: Path, **settings: Any) -> Path:
    run_dir = tmp_path / "run"
    data = {"dataset_path": str(write_corpus(tmp_path / "words.txt")), "cache_dir": str(tmp_path / "cache")}
    train(resolve("recommended", {}, {**SETTINGS, **data, "output_dir": str(run_dir), **settings}))
    return run_dir


def test_a_dry_run_says_when_each_trigger_would_have_grown_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = recorded(tmp_path, dry_run=True)
    assert "a dry run: nothing grew" in capsys.readouterr().out
    table = trigger_table(run_dir, (0.2, 0.8))
    assert "with 1 layers, evaluations from step 4 to 40:" in table
    assert "fixed      at step 12" in table
    for trigger in ("geometric", "plateau", "random"):
        assert f"  {trigger} " in table
    assert "quantile 0.2 " in table
    assert table.index("quantile 0.2 ") < table.index("quantile 0.8 ")
    assert "--tau_crit" in table


def test_a_run_that_grew_is_asked_depth_by_depth(tmp_path: Path) -> None:
    table = trigger_table(recorded(tmp_path), (0.5,))
    assert "with 1 layers" in table
    assert "with 2 layers" in table
    assert "no geometry was measured" in table
    assert "the final depth" in table
