"""Studies: conditions x seeds under one budget, one evaluator, statistics and a report.

The names below are loaded when someone asks for them: a worker needs none of what writes the report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalogue import find_spec, shipped_names
    from .runner import StudyResult, report_study, run_study
    from .spec import Claims, Comparison, Condition, StudySpec, Tuning, read_spec
    from .state import study_state

_HOME = {
    "Claims": "spec",
    "Comparison": "spec",
    "Condition": "spec",
    "StudyResult": "runner",
    "StudySpec": "spec",
    "Tuning": "spec",
    "find_spec": "catalogue",
    "read_spec": "spec",
    "report_study": "runner",
    "run_study": "runner",
    "shipped_names": "catalogue",
    "study_state": "state",
}

__all__ = [
    "Claims",
    "Comparison",
    "Condition",
    "StudyResult",
    "StudySpec",
    "Tuning",
    "find_spec",
    "read_spec",
    "report_study",
    "run_study",
    "shipped_names",
    "study_state",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
