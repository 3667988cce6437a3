"""Numbers and plans as people read them, on the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aiether.geometry import GeometryMetrics

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
NONE = "–"


def count(value: float | None) -> str:
    """12,345; 12.3 M; 1.23 B."""
    if value is None or not math.isfinite(value):
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def scientific(value: float | None, digits: int = 2) -> str:
    """1.24×10¹⁴."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}×{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """10¹⁴."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def geometry(metrics: GeometryMetrics) -> tuple[str, ...]:
    """τ and κ, raw and normalised, ρ, participation ratio and displacement: a line of a table."""
    quotients = (
        metrics.tau,
        metrics.tau_normalised,
        metrics.kappa,
        metrics.kappa_normalised,
        metrics.rho,
        metrics.participation_ratio,
    )
    moved = metrics.path_length > 0  # without movement the quotients are defined and mean nothing
    shown = (f"{value:.3g}" if moved else NONE for value in quotients)
    return (*shown, f"{metrics.displacement:.3g}")


def duration(seconds: float | None) -> str:
    """45 s; 12 min 05 s; 3 h 20 min."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def loss(value: float | None) -> str:
    """Three decimals: what a loss of one run can bear."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """+0.012 or −0.012."""
    return f"{value:+.3f}".replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def anything(value: Any) -> str:
    """A value of a configuration or a metric."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else NONE
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(anything(item) for item in value) or NONE
    return str(value)


def plan_words(plan: Mapping[str, Any]) -> str:
    """`stack, copy: 0-2 +0-2`: the new stack from the input up, a plus before each new layer's source."""
    layers = _in_runs([(int(x["source"]), bool(x["is_new"])) for x in plan.get("layers", ())])
    how = ", ".join(str(plan[key]) for key in ("placement", "init") if plan.get(key))
    return f"{how}: {layers}" if layers else how or NONE


def _in_runs(origins: Sequence[tuple[int, bool]]) -> str:
    """Sources that count upwards are written as a range; a plus marks the new layers."""
    runs: list[tuple[int, int, bool]] = []
    for source, is_new in origins:
        if runs and runs[-1][1:] == (source - 1, is_new):
            runs[-1] = (runs[-1][0], source, is_new)
        else:
            runs.append((source, source, is_new))
    return " ".join(f"{'+' * new}{first}" + (f"-{last}" if last > first else "") for first, last, new in runs)
