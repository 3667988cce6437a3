"""What a check found, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes
    ----------
    name: what was checked.
    passed: None where the check does not apply to the model; `detail` says why.
    worst: the largest difference of two logits that should be equal (NaN where they are not finite); of the
        gradients, how many parameters have a fault.
    bound: the largest `worst` that passes.
    where: where `worst` was found.
    detail: more, in words.
    """

    name: str
    passed: bool | None
    worst: float = 0.0
    bound: float = 0.0
    where: str = ""
    detail: str = ""

    @classmethod
    def not_applicable(cls, name: str, why: str) -> Check:
        """A check that could not be made."""
        return cls(name, None, detail=why)

    @property
    def status(self) -> Status:
        """`passed` in words."""
        if self.passed is None:
            return "not applicable"
        return "passed" if self.passed else "failed"


@dataclass(frozen=True)
class ConformanceReport:
    """All checks of one model; `str` is a plain table.

    Attributes
    ----------
    model: the model's class.
    parameters: how many numbers it holds.
    length: tokens of the sequences that were tried.
    seed: what they were drawn with.
    checks: in the order in which they were made.
    note: what was changed to check the model, in words.
    """

    model: str
    parameters: int
    length: int
    seed: int
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """No check failed, and one at least was made."""
        outcomes = {check.passed for check in self.checks}
        return False not in outcomes and True in outcomes

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN as None."""
        checks = [asdict(check) | {"status": check.status} for check in self.checks]
        for check in checks:
            check["worst"] = check["worst"] if check["worst"] == check["worst"] else None
        return asdict(self) | {"passed": self.passed, "checks": checks}

    def __str__(self) -> str:
        rows = [("check", "result", "worst", "bound", "where"), *map(_row, self.checks)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        details = [f"{check.name}: {check.detail}" for check in self.checks if check.detail]
        counts = [
            f"{number} {status}"
            for status in ("passed", "failed", "not applicable")
            if (number := sum(check.status == status for check in self.checks))
        ]
        size = f"{self.parameters:,} parameters"
        head = f"{self.model}, {size}, sequences of {self.length} tokens, seed {self.seed}"
        notes = [self.note] if self.note else []
        return "\n".join([head, *notes, "", *lines, "", *details, ", ".join(counts)])


def _row(check: Check) -> Sequence[str]:
    if check.passed is None:
        return check.name, check.status, "", "", ""
    return check.name, check.status, f"{check.worst:.2g}", f"{check.bound:.2g}", check.where
