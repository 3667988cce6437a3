"""Every sentence of the verdicts: its words must be the right ones, its numbers those of the raw records."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.study.raw_records import (
    Saved,
    Study,
    at_equal_cost,
    at_equal_loss,
    detectable,
    effect,
    holm,
    interval,
    sign_flip,
    t_test,
)

Row = dict[str, Any]
TABLE_COST = {"tokens": "tokens", "flops": "FLOPs", "seconds": "training time"}
UNIT = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


def check_verdicts(study: Study) -> None:
    """Those of results.json against the raw records; tables.md and the page must show the same ones."""
    results = study.results
    _shown(study)
    pairs, effects = results["comparisons"], results["factorial"] or ()
    _comparisons(study, pairs, [study.gaps(row["arm"], row["against"]) for row in pairs])
    _comparisons(study, effects, [effect(study, row["effect"]) for row in effects])
    for row in results["equal_cost"]:
        _equal_cost(study, row)
    for row in results["savings"]:
        _saving(study, row)
    _edges(study)


def _shown(study: Study) -> None:
    """Every sentence stands once in tables.md and on the page, below its heading, about its pair."""
    expected: dict[str, list[tuple[str, str]]] = {}
    headings = {"comparisons": "Planned comparisons", "equal_cost": "At equal cost"}
    headings["savings"] = "Cost of the same loss"
    for key, heading in headings.items():
        for row in study.results[key]:
            said = row["verdict"]
            if key == "savings" and UNIT[row["cost"]] not in said:
                said = f"{TABLE_COST[row['cost']]}: {said}"
            pair = f"{row['arm']} against {row['against']}"
            expected.setdefault(heading, []).append((pair, said))
    for row in study.results["factorial"] or ():
        expected.setdefault("Effects of the factors", []).append((row["effect"], row["verdict"]))
    assert {heading: sorted(said) for heading, said in expected.items()} == _in_markdown(study.page)
    assert {heading: sorted(said) for heading, said in expected.items()} == _in_html(study.html)


def _in_markdown(page: str) -> dict[str, list[tuple[str, str]]]:
    verdicts = re.sub(r"\\(.)", r"\1", page.partition("## Verdicts\n")[2].partition("\n## ")[0])
    parts = re.split(r"^### (.*)$", verdicts, flags=re.MULTILINE)
    found = {
        heading: re.findall(r"^- \*\*(.*?)\*\*: (.*)$", text, flags=re.MULTILINE)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {heading: sorted(said) for heading, said in found.items()}


def _in_html(page: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for heading, items in re.findall(
        r'<h3>([^<]*)</h3>\s*<ul class="verdicts[^>]*>(.*?)</ul>', page, re.DOTALL
    ):
        for about, said in re.findall(r"<li><b>(.*?)</b>(.*?)</li>", items, re.DOTALL):
            spans = re.findall(r"<span>(.*?)</span>", said)
            found.setdefault(heading, []).extend(
                (html.unescape(about), html.unescape(each)) for each in spans
            )
    return {heading: sorted(said) for heading, said in found.items()}


def _parts(pattern: str, said: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, said)
    assert found, f"{said!r} is not what the records say: {pattern}"
    return found.groups()


def _numbers(study: Study, row: Row, key: str, expected: Sequence[float | None]) -> None:
    """The figures of each seed in results.json."""
    assert [each is None for each in row[key]] == [each is None for each in expected], row
    for found, wanted in zip(row[key], expected, strict=True):
        if found is not None and wanted is not None:
            np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)
            study.checked += 1


# -- planned comparisons ----------------------------------------------------------------------------------


def _comparisons(study: Study, rows: Sequence[Row], found: Sequence[np.ndarray]) -> None:
    alpha, size = study.spec["alpha"], len(rows)
    test = {"t": t_test, "sign_flip": sign_flip}[study.spec["test"]]
    ps = holm([test(gaps) if len(gaps) > 1 else 1.0 for gaps in found])
    for row, gaps, p in zip(rows, found, ps, strict=True):
        _numbers(study, row, "differences", list(gaps))
        said, n = row["verdict"], len(gaps)
        if n < 2:
            assert said == ("one seed: no test" if n else "no seeds: no test")
        elif not gaps.any():
            assert said == f"no difference in any of {n} seeds"
        elif p <= alpha:
            _difference(study, said, gaps, p, corrected=size > 1, interaction=" x " in row.get("effect", ""))
        elif study.spec["test"] == "sign_flip" and 2.0 ** (1 - n) > alpha / size:
            needed = next(m for m in range(1, 64) if 2.0 ** (1 - m) <= alpha / size)
            reach = r"not distinguishable: (\d+) seeds cannot reach p = (\S+) in a sign-flip test, (\d+) can"
            for cell, wanted in zip(_parts(reach, said), (n, alpha / size, needed), strict=True):
                study.same(cell, wanted)
        else:
            shown = _parts(r"not distinguishable: (\d+) seeds could have shown (\S+)", said)
            study.same(shown[0], n)
            study.same(shown[1], detectable(gaps, alpha / size))


def _difference(
    study: Study, said: str, gaps: np.ndarray, p: float, *, corrected: bool, interaction: bool
) -> None:
    side = "interaction of" if interaction else "lower by" if gaps.mean() < 0 else "higher by"
    after = " after Holm" if corrected else ""
    mean, half, n, how, shown = _parts(rf"{side} (\S+) ± (\S+) over (\d+) seeds; p (=|<) (\S+){after}", said)
    low, high = interval(gaps)
    study.same(mean, gaps.mean() if interaction else abs(gaps.mean()))
    study.same(half, (high - low) / 2)
    study.same(n, len(gaps))
    if how == "<":
        assert p < float(shown), said
        study.checked += 1
    else:
        study.same(shown, p)


# -- at equal cost, and the cost of the same loss ---------------------------------------------------------


def _equal_cost(study: Study, row: Row) -> None:
    found = list(at_equal_cost(study, row["arm"], row["against"], TABLE_COST[row["cost"]]).values())
    _numbers(study, row, "differences", found)
    gaps, said, unit = [gap for gap in found if gap is not None], row["verdict"], UNIT[row["cost"]]
    if not gaps:
        assert said == f"no comparison at equal {unit}: the runs lie outside the baseline's lengths"
        return
    side, outside = "lower" if np.mean(gaps) < 0 else "higher", _outside(len(found) - len(gaps))
    if len(gaps) == 1:
        (mean,) = _parts(rf"{side} by (\S+) at equal {unit} \(one seed\){outside}", said)
    else:
        mean, *spread, n = _parts(
            rf"{side} by (\S+) at equal {unit} \(95 %: (\S+) to (\S+), (\d+) seeds\){outside}", said
        )
        for cell, wanted in zip((*spread, n), (*interval(gaps), len(gaps)), strict=True):
            study.same(cell, wanted)
    study.same(mean, abs(float(np.mean(gaps))))


def _outside(seeds: int) -> str:
    return f"; {seeds} seed{'s' if seeds > 1 else ''} outside the baseline's curve" if seeds else ""


def _saving(study: Study, row: Row) -> None:
    found = list(at_equal_loss(study, row["arm"], row["against"], TABLE_COST[row["cost"]]).values())
    inside = [each.share if each and not each.beyond else None for each in found]
    _numbers(study, row, "savings", inside)
    if any(each and each.beyond for each in found):
        _bound(study, row, found)
        return
    shares = [100 * share for share in inside if share is not None]
    said, unit, outside = row["verdict"], UNIT[row["cost"]], _outside(len(found) - len(shares))
    if not shares:
        assert said == f"no saving known{outside}"
        return
    mean = float(np.mean(shares))
    more = "fewer" if mean > 0 else "more"
    if len(shares) == 1:
        (shown,) = _parts(rf"(\S+)% {more} {unit} in one seed: no interval{outside}", said)
        study.same(shown, abs(mean))
        return
    low, high = interval(shares)
    if low <= 0 <= high:
        parts = _parts(rf"no saving shown: (\S+) ± (\S+) % over (\d+) seeds{outside}", said)
    else:
        parts = _parts(rf"(\S+) ± (\S+) % {more} {unit} over (\d+) seeds{outside}", said)
        mean = abs(mean)
    for cell, wanted in zip(parts, (mean, (high - low) / 2, len(shares)), strict=True):
        study.same(cell, wanted)


def _bound(study: Study, row: Row, found: Sequence[Saved | None]) -> None:
    """Where seeds are better than the baseline's longest run, the least that was saved."""
    least = 100 * float(np.mean([each.share for each in found if each]))
    better, unit = sum(each is not None and each.beyond for each in found), UNIT[row["cost"]]
    words = rf"at least (\S+)% fewer {unit}"
    if least <= 0:
        words = rf"no saving shown: at most (\S+)% more {unit}"
    seeds = r" \((\d+) of (\d+) seeds better than the baseline's longest run\)"
    for cell, wanted in zip(
        _parts(words + seeds, row["verdict"]), (abs(least), better, len(found)), strict=True
    ):
        study.same(cell, wanted)


# -- learning rates ---------------------------------------------------------------------------------------


def _edges(study: Study) -> None:
    """Said before the verdicts: whose best rate lay at the edge of the grid."""
    grid = (study.spec.get("tuning") or {}).get("lr", ())
    edges = []
    for condition in study.spec["conditions"] if grid else ():
        tried = {run.last["eval_loss"]: run.lr for run in study.tuning if run.condition == condition}
        if tried[min(tried)] in (min(grid), max(grid)):
            edges.append(condition)
    said = re.findall(r"at the edge of the grid for (.*):", study.page.replace("\\", ""))  # Markdown's
    assert [name for each in said for name in re.split(", | and ", each)] == edges
    study.checked += len(edges)
