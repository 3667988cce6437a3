"""Writes the measured figures of README and docs from committed JSON, after a benchmark or study ran anew."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
STUDIES = REPOSITORY / "results"
BEGIN, END = "<!-- {block}: begin -->", "<!-- {block}: end -->"


def table() -> str:
    """One row a claim: what, figure, the command that reruns it."""
    growth = [*_growth(), *_studies()]
    rows = [*growth, _demo(), _geometry(), _watching(), _throughput(), _kills(), _study_kills()]
    return "\n".join(["| What | Measured | Rerun |", "|---|---|---|", *rows])


def with_measured(page: str, measured: Mapping[str, Callable[[], str]]) -> str:
    """The page with what lies between the two markers of each block replaced."""
    for block, text in measured.items():
        first, last = BEGIN.format(block=block), END.format(block=block)
        before, begin, rest = page.partition(first)
        _, end, after = rest.partition(last)
        assert begin, f"the page lacks {first}"
        assert end, f"the page lacks {last}"
        page = f"{before}{first}\n\n{text()}\n\n{last}{after}"
    return page


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _growth() -> list[str]:
    """The best recipe with three seeds of each optimizer, and the long pair."""
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "recipe_savings.py"))
    ends = script["read_ends"](sorted((RESULTS / "recipe").glob("*.jsonl")))
    saved = script["savings"](ends)
    rows, rerun = [], "[docs/recipe.md](docs/recipe.md)"
    merged = [
        row for row in script["over_seeds"](saved) if len(row["flops_saved"]) >= 3 and row["seconds_saved"]
    ]
    for optimizer, name in (("adamw", "AdamW"), ("muon", "Muon")):
        best = max((r for r in merged if r["optimizer"] == optimizer), key=lambda r: fmean(r["flops_saved"]))
        each = ", ".join(f"{saved:.0%}" for saved in best["flops_saved"])
        figure = (
            f"{fmean(best['flops_saved']):.0%} fewer FLOPs ({each}) and {fmean(best['seconds_saved']):.0%} "
            f"less time ({len(best['seconds_saved'])} of the seeds) than the tuned static run: "
            f"`{best['name']}` (12 layers of width {best['width']}, 1.4 tokens a parameter, H100)"
        )
        rows.append(f"| Growth at equal loss, {name}, short runs | {figure} | {rerun} |")
    long = [row for row in saved if row["group"] == ("muon", 256, 0)]
    best = max((row for row in long if row["saved"]["flops"] is not None), key=lambda r: r["saved"]["flops"])
    late = max(long, key=lambda row: row["loss"])
    static = min(
        (end for end in ends if end.group == ("muon", 256, 0) and end.static),
        key=lambda end: abs(end.flops - late["flops"]),
    )
    figure = (
        f"{best['saved']['flops']:.0%} fewer FLOPs with growths at {_times(best)} of the steps; with one at "
        f"{_times(late)} {late['loss']:.3f} nats against {static.loss:.3f} for as many FLOPs (12 layers of "
        "width 256, one seed)"
    )
    return [*rows, f"| The same at 20 tokens a parameter, Muon | {figure} | {rerun} |"]


def _times(row: dict[str, Any]) -> str:
    """The fractions of the steps at which a run grew, from its name."""
    return " and ".join(f"0{time}" for time in row["name"].partition("@")[2].split(","))


def _demo() -> str:
    demo = _read("demo")
    grown, static = demo["grown"], demo["static"]
    growths = ", ".join(f"{g['depth_before']} to {g['depth_after']} at {g['step']}" for g in demo["growths"])
    figure = (
        f"{grown['depth']} layers after {grown['flops']:.2g} FLOPs: {grown['eval_loss']:.3f} nats grown "
        f"({growths} of {grown['steps']} steps), {static['eval_loss']:.3f} static; nothing tuned, one seed"
    )
    return f"| The demo, held-out loss | {figure} | `make demo` |"


def _geometry() -> str:
    runs = {run["threads"]: run["speedup"] for run in _read("geometry")["against_full_svd"]}
    slowest = min(speedup[dtype]["elapsed_s"] for speedup in runs.values() for dtype in speedup)
    figure = f"at least {int(slowest)} times NumPy's full SVD, one GPT-2-small block, 15 snapshots, same CPU"
    return f"| Extrapolation | {figure} | `python benchmarks/geometry.py` |"


def _watching() -> str:
    run = _read("watching")["run"]
    model = f"{run['n_layer']} layers of width {run['n_embd']}"
    low, high = run["interval_95"]
    figure = (
        f"{low:+.1%} to {high:+.1%} training time (95 %) against the same run without; "
        f"{run['share_inside_watching']:.2%} is spent inside its calls ({model}, CPU)"
    )
    return f"| Watching | {figure} | `python benchmarks/watching.py` |"


def _throughput() -> str:
    result = _read("throughput")
    (row,) = (row for row in result["grown"] if row["optimizer"] == "adamw")
    figure = (
        f"{row['speed_over_probe']:.2f} times a plain training loop, both growths included (AdamW, 3 to 12 "
        f"layers of width 512, bf16, {row['steps']} steps, {result['gpu']})"
    )
    return f"| Training speed | {figure} | `python benchmarks/throughput.py` |"


def _kills() -> str:
    kills = _read("kill_resume")
    outcome = "equal to the undisturbed run in every bit" if kills["equal"] else "not equal"
    figure = f"{len(kills['kills'])} random `kill -9`, {len(kills['growths'])} growths: {outcome}"
    return f"| Resume | {figure} | `python benchmarks/kill_resume.py` |"


def _study_kills() -> str:
    kills = _read("study_kills")
    outcome = "the same results" if kills["equal_results"] else "other results"
    figure = (
        f"{len(kills['kills'])} `kill -9` of runner and workers, {kills['runs']} runs: {outcome}, timings "
        "aside; two equal arms give equal curves, bit for bit"
    )
    return f"| A study, killed | {figure} | `python benchmarks/study_kills.py` |"


# -- studies ----------------------------------------------------------------------------------------------


def _study(preset: str) -> Any:
    path = STUDIES / "growth_vs_static" / preset / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _row(rows: list[dict[str, Any]], arm: str, cost: str | None = None) -> dict[str, Any]:
    (found,) = (row for row in rows if row["arm"] == arm and (cost is None or row["cost"] == cost))
    return found


_WORDS = {"tokens": ("fewer", "tokens"), "flops": ("fewer", "FLOPs"), "seconds": ("less", "time")}


def _saved(study: Any, arm: str, cost: str) -> str:
    """For example "32 ± 2 % fewer FLOPs", or "no FLOPs saved (2 ± 3 %)" where the interval holds 0."""
    row = _row(study["savings"], arm, cost)
    assert row["n"] == len(study["study"]["seeds"]), f"{arm}: a mean over some of the seeds needs other words"
    fewer, what = _WORDS[cost]
    low, high = row["ci95"]
    mean, half = round(100 * row["mean"]), 50 * (high - low)
    if low <= 0.0 <= high:  # shows no saving
        return f"no {what} saved ({'−' if mean < 0 else ''}{abs(mean)} ± {half:.0f} %)"
    return f"{abs(mean)} ± {half:.0f} % {fewer if row['mean'] > 0 else 'more'} {what}"


def _studies() -> list[str]:
    """What growing saved in the committed studies, at equal loss."""
    rows = []
    arms = {"AdamW": "recommended-adamw", "Muon": "recommended-muon", "report's preset": "report-adamw"}
    for preset, what in (("gpu", "12 layers"), ("gpu-3-layers", "3 layers, equal time")):
        study = _study(preset)
        saved = "; ".join(
            f"{name} {_saved(study, arm, 'flops')}, {_saved(study, arm, 'seconds')}"
            for name, arm in arms.items()
        )
        figure = f"{saved} (static runs tuned too, {len(study['study']['seeds'])} seeds, {_gpu(study)})"
        figure += "".join(f"; {limit}" for limit in _limits(study))
        command = f"`aiether study run growth_vs_static --preset {preset}`"
        rows.append(f"| The same loss, {what} | {figure} | {command} |")
    return rows


def _gpu(study: Any) -> str:
    return study["environment"]["machine"]["processor"]


def _limits(study: Any) -> list[str]:
    """What weakens the figures of a study."""
    edges = [each for each in study["tuning"] if each["at_edge"]]
    names = ", ".join(each["condition"] for each in edges)
    found = [f"the best rate of {names} lay at the edge of the grid"] if edges else []
    if not any(row["distinguishable"] for row in study["comparisons"]):
        unit = {"tokens": "tokens", "seconds": "time"}[study["study"]["budget"]["unit"]]
        found.append(f"at equal {unit} no difference of loss is distinguishable after Holm")
    return found


def study_tables() -> str:
    """A table for each committed study: the difference at the whole budget, and what the same loss cost."""
    return "\n\n".join(_study_table(_study(preset)) for preset in ("gpu", "gpu-3-layers"))


def _study_table(study: Any) -> str:
    spec = study["study"]
    amount, unit = spec["budget"]["amount"], spec["budget"]["unit"]
    budget = f"{amount / 1e6:.1f} M tokens" if unit == "tokens" else f"{amount:g} s of training"
    limits = "".join(f" {limit[0].upper()}{limit[1:]}." for limit in _limits(study))
    lines = [
        f"**`--preset {spec['preset']}`**: {budget}, {len(spec['seeds'])} seeds, {_gpu(study)}.{limits}",
        "",
        "| arm, against its static baseline | loss at the budget | tokens | FLOPs | time |",
        "|---|---|---|---|---|",
    ]
    for row in study["comparisons"]:
        low, high = row["ci95"]
        sign = "−" if row["mean"] < 0 else "+"
        loss = f"{sign}{abs(row['mean']):.3f} ± {(high - low) / 2:.3f}, p = {row['t_p_holm']:.2g}"
        saved = [_saved(study, row["arm"], cost) for cost in ("tokens", "flops", "seconds")]
        lines.append(f"| {row['arm']} | {' | '.join((loss, *saved))} |")
    return "\n".join(lines)


def speed_tables() -> str:
    """LAHR models against the dense one: how much faster each is, beside the quotient of FLOPs."""
    parts = []
    for run, what in (("cuda", ""), ("cuda_static", ", decoding with static caches"), ("cpu", "")):
        result = _read(f"adaptive_speed_{run}")
        place = result.get("gpu") or f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
        parts += [f"On {place}{what}:", *(_speed(*each) for each in result["shapes"].items())]
    return "\n\n".join(parts)


def _speed(label: str, measured: Any) -> str:
    shape, arms = measured["shape"], measured["arms"]
    columns = [name for name, entry in arms["dense"].items() if isinstance(entry, dict)]
    windows = "1 window" if shape["batch_size"] == 1 else f"{shape['batch_size']} windows"
    about = f"{shape['n_layer']} layers, {windows} of {shape['context_length']:,} tokens"
    lines = [
        f"{label[0].upper()}{label[1:]} ({about}):",
        "",
        f"| arm | dense FLOPs over its own | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for name, arm in arms.items():
        speeds = [f"{arm[column]['ratio']:.2f}" for column in columns]
        if name == "dense":
            speeds = [f"{arm[column]['tokens_per_s']:,.0f} tokens/s" for column in columns]
        lines.append(f"| {name} | {arm['flops_ratio']:.2f} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def toroidal_tables() -> str:
    """Time of a layer over that of plain attention, peak memory, and the arithmetic beside it."""
    return "\n\n".join(
        _layer_times(_read(name)) for name in ("toroidal_speed_cuda", "toroidal_speed_cuda_h200")
    )


def _layer_times(result: Any) -> str:
    lengths = {length: result["lengths"][length] for length in sorted(result["lengths"], key=int)}
    parts = [
        part for part in ("layer", "layer, compiled", "attention") if part in next(iter(lengths.values()))
    ]
    titles = [
        f"{part}, N = {int(length):,}" for length in lengths for part in (*parts, "memory", "arithmetic")
    ]
    arms = next(iter(lengths.values()))["layer"]
    rows = [f"On {result['gpu']}:", "", f"| arm | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for arm in arms:
        cells: list[str] = []
        for found in lengths.values():
            for part in parts:
                row = found[part].get(arm)
                cells.append("" if row is None else _time(row, arm))
            cells.append(f"{found['layer'][arm]['peak_ratio']:.2f}")
            told = found["arithmetic"][arm]
            cells.append(f"{told['computed']:.2f} ({told['needed']:.2f})")
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _time(row: dict[str, float], arm: str) -> str:
    return f"{1e3 * row['seconds']:.1f} ms" if arm == "plain" else f"{row['ratio']:.2f}"


def prosqa_tables() -> str:
    """ProsQA by hops, and halting."""
    if not (RESULTS / "prosqa.json").exists():
        return "Not measured yet."
    script = runpy.run_path(str(REPOSITORY / "scripts" / "prosqa_figures.py"))
    return script["tables"](_read("prosqa"))


def conversion_tables() -> str:
    """What each row of `toroidal_table` costs, beside its control, by windows and epochs."""
    presets = {
        "gpu": "200 windows",
        "gpu-10-epochs": "200, ten epochs",
        "gpu-1000": "1,000 windows",
        "gpu-texts": "200 of other texts",
        "gpu-1000-texts": "1,000 of other texts",
    }
    return _conversions(presets)


def small_conversion_tables() -> str:
    return _conversions({"cpu": "60 steps", "cpu-10-epochs": "500 steps"})


def _conversions(presets: Mapping[str, str]) -> str:
    studies = [_toroidal("table", preset) for preset in presets]
    titles = [f"{title} | perplexity" for title in presets.values()]
    lines = [f"| arm | against | {' | '.join(titles)} | FLOPs |", "|" + "---|" * (2 * len(presets) + 3)]
    for arm in studies[0]["arms"]:
        rows = [
            _row(study["comparisons"], arm["condition"]) if _compared(study, arm) else None
            for study in studies
        ]
        controls = {row["against"] for row in rows if row}
        if controls:
            assert len(controls) == 1, "one control for all columns"
            cells = [f"{_gap(row)} | {math.exp(row['mean']):.3f}" if row else " | " for row in rows]
            flops = _flops(arm["flops_per_token"]["end"])
            lines.append(f"| {_named(arm)} | {controls.pop()} | {' | '.join(cells)} | {flops} |")
    return "\n".join(lines)


def row_tables() -> str:
    """Perplexities of the kept models of `toroidal_table` on other texts."""
    return "\n\n".join(
        f"After {windows}:\n\n{_on_texts(_read(name), _toroidal('table', preset))}"
        for windows, name, preset in (
            ("200 windows", "toroidal_rows", "gpu"),
            ("1,000 windows", "toroidal_rows_1000", "gpu-1000"),
            ("5,000 windows", "toroidal_rows_5000", "gpu-5000-all"),
            ("200 windows of other texts", "toroidal_rows_200_texts", "gpu-texts"),
            ("1,000 windows of other texts", "toroidal_rows_1000_texts", "gpu-1000-texts"),
        )
    )


def all_layers_row_tables() -> str:
    """The same of the ways to move all layers that were run with their models kept."""
    return _on_texts(_read("toroidal_rows_all"), _toroidal("sweeps_all", "gpu-hidden"))


def text_tables() -> str:
    return _texts("gpu", "toroidal_rows_texts")


def more_text_tables() -> str:
    return _texts("gpu-most", "toroidal_rows_texts_most")


def small_text_tables() -> str:
    return _texts("cpu", "toroidal_rows_texts_cpu")


def _texts(preset: str, rows: str) -> str:
    """All layers tuned on one text or another: on the study's own held-out text, and on others."""
    study = _toroidal("sweeps_texts", preset)
    return "\n\n".join([_sweep("sweeps_texts", preset), _on_texts(_read(rows), study)])


def legacy_tables() -> str:
    """The reference's arithmetic, of an earlier run's models."""
    result = _read("toroidal_rows_legacy")
    found = _by_arm(result)
    names = list(found["before"][-1]["legacy"])
    lines = [f"| arm | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for arm, rows in found.items():
        cells = [f"{fmean(row['legacy'][name] for row in rows.values()):.0f}" for name in names]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _on_texts(result: Any, study: Any) -> str:
    """Each arm's perplexity on each text, and its quotient with the control's."""
    texts = {"wikitext-2": "WikiText-2", "wikipedia": "Wikipedia"}
    against = {row["arm"]: row["against"] for row in study["comparisons"]}
    found = _by_arm(result)
    titles = [each for title in texts.values() for each in (title, "over its control's", "by seed")]
    lines = [f"| arm | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for arm, rows in found.items():
        cells = []
        for text in texts:
            cells.append(f"{fmean(row['perplexity'][text] for row in rows.values()):.2f}")
            control = found.get(against.get(arm, ""), {})
            gaps = [
                rows[seed]["loss"][text] - control[seed]["loss"][text] for seed in rows if seed in control
            ]
            each = ", ".join(f"{math.exp(gap):.4f}" for gap in gaps)
            cells += [f"{math.exp(fmean(gaps)):.4f}" if gaps else "", each]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_arm(result: Any) -> dict[str, dict[int, Any]]:
    """A benchmark's rows, by arm and seed."""
    found: dict[str, dict[int, Any]] = {}
    for row in result["rows"]:
        found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def sweep_tables() -> str:
    return _sweep("sweeps", "gpu")


def all_layers_tables() -> str:
    return _sweep("sweeps_all", "gpu")


def hidden_tables() -> str:
    return _sweep("sweeps_all", "gpu-hidden")


def _sweep(name: str, preset: str) -> str:
    """Each arm of a study beside its control."""
    study = _toroidal(name, preset)
    lines = ["| arm | against | difference |", "|---|---|---|"]
    for arm in study["arms"]:
        if _compared(study, arm):
            row = _row(study["comparisons"], arm["condition"])
            lines.append(f"| {_named(arm)} | {row['against']} | {_gap(row)} |")
    return "\n".join(lines)


def _toroidal(name: str, preset: str) -> Any:
    path = STUDIES / f"toroidal_{name}" / preset / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _compared(study: Any, arm: Any) -> bool:
    return any(row["arm"] == arm["condition"] for row in study["comparisons"])


def _named(arm: Any) -> str:
    return f"`{arm['condition']}`: {arm['about']}"


def _gap(row: Any) -> str:
    low, high = row["ci95"]
    return f"{row['mean']:+.4f} ± {(high - low) / 2:.4f}"


def _flops(number: float) -> str:
    return f"{number / 1e6:.0f} M" if number >= 1e7 else f"{number / 1e6:.1f} M"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"measured": table},
    "docs/studies.md": {"measured": study_tables},
    "docs/adaptive.md": {"measured": speed_tables},
    "docs/prosqa.md": {"measured": prosqa_tables},
    "docs/toroidal.md": {
        "measured": toroidal_tables,
        "conversions": conversion_tables,
        "small conversions": small_conversion_tables,
        "rows": row_tables,
        "legacy rows": legacy_tables,
        "sweeps": sweep_tables,
        "all layers": all_layers_tables,
        "all layers, hidden states": hidden_tables,
        "all layers on texts": all_layers_row_tables,
        "texts": text_tables,
        "more texts": more_text_tables,
        "small texts": small_text_tables,
    },
}
"""The blocks of each page, by the name in their markers."""


if __name__ == "__main__":
    for name, measured in PAGES.items():
        path = REPOSITORY / name
        path.write_text(with_measured(path.read_text(encoding="utf-8"), measured), encoding="utf-8")
