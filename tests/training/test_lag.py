"""`aiether train --trigger lag`: what a probe costs is in every figure of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiether.training.trigger_table import trigger_table

from .test_trigger_table import recorded

pytestmark = pytest.mark.usefixtures("without_report")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_probes_are_paid_for_and_on_record(tmp_path: Path) -> None:
    forms = ("stack/copy", "interleave/zero")
    run_dir = recorded(
        tmp_path, trigger="lag", lag_interval=2, lag_steps=2, lag_candidates=forms, max_steps=24, max_layers=2
    )
    probes = [row for row in rows(run_dir / "events.jsonl") if row["event"] == "probe"]
    assert probes
    assert [c["name"] for c in probes[0]["candidates"]] == ["stay", *forms]
    evaluations = [row for row in rows(run_dir / "metrics.jsonl") if row["kind"] == "eval"]
    grown_at = {row["step"]: row["depth"] for row in evaluations}
    stay = probes[0]["candidates"][0]
    one, two = (c["flops"] / c["steps"] for c in probes[0]["candidates"][:2])
    trained = sum(one if depth == 1 else two for depth in grown_at.values()) * 4  # an evaluation each 4 steps
    assert evaluations[-1]["flops"] == trained + sum(probe["flops"] for probe in probes)
    assert stay["steps"] > 2
    assert evaluations[-1]["elapsed_s"] > sum(probe["seconds"] for probe in probes)
    assert evaluations[-1]["tokens"] == 24 * 2 * 16, "a fork's batches are the run's own, trained on later"


def test_a_record_cannot_be_asked_what_lag_would_have_done(tmp_path: Path) -> None:
    table = trigger_table(recorded(tmp_path, dry_run=True, max_steps=12), (0.5,))
    assert "lag        unknown       cannot be asked from a record: it trains forks" in table
