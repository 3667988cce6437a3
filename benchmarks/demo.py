"""Keeps the result of `make demo` as JSON, and its picture for the README.

make demo && python benchmarks/demo.py
"""

from __future__ import annotations

import json
from pathlib import Path

from _machine import about
from aiether.training.report import save_hero_figure

REPOSITORY = Path(__file__).parents[1]
RUN = REPOSITORY / "runs" / "demo"


def main() -> None:
    summary = json.loads((RUN / "summary.json").read_text())
    (static,) = summary.pop("baselines")
    events = [json.loads(line) for line in (RUN / "events.jsonl").read_text().splitlines()]
    kept = ("step", "depth_before", "depth_after", "loss_before", "loss_after", "reason")
    result = {
        "grown": summary,
        "static": static,
        "growths": [{key: e[key] for key in kept} for e in events if e["event"] == "growth"],
        "environment": json.loads((RUN / "environment.json").read_text()),
        **about(seeds=[0]),
    }
    (REPOSITORY / "benchmarks" / "results" / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    save_hero_figure(RUN, REPOSITORY / "docs" / "assets" / "demo.svg")


if __name__ == "__main__":
    main()
