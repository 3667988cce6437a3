"""LAHR models in the main job: settings, sizes, costs, training, resuming, growing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.corpus import write_corpus

from aiether.adaptive import PARTS, SIZES, LahrSettings, set_halt_q, trace_tokens
from aiether.evaluation import flops_per_token, measure_flops_per_token
from aiether.training.config import merge, resolve
from aiether.training.generate import generate, load_model
from aiether.training.model import build_model, undrawn_model
from aiether.training.optimizer import build_optimizer
from aiether.training.run import train

PAGE = Path(__file__).parents[2] / "docs" / "adaptive.md"
SMALL: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 32,
    "context_length": 48,
    "vocab_size": 300,
    "dropout": 0.0,
    "eos_token_id": None,
}


def without_numbers(condition: str, **shape: Any) -> Any:
    with torch.device("meta"):
        lahr = LahrSettings(lahr_condition=condition)  # type: ignore[arg-type]
        return undrawn_model("lahr", **{**SMALL, **shape}, lahr=lahr)


def parameters(condition: str, **shape: Any) -> int:
    return sum(p.numel() for p in without_numbers(condition, **shape).parameters())


ROUTERS = ("topk", "threshold", "random", "stride")


@pytest.mark.parametrize(
    ("condition", "router"),
    [
        (name, router)
        for name, (routed, *_) in PARTS.items()
        for router in (ROUTERS if routed else ROUTERS[:1])
    ],
)
def test_flops_in_closed_form_are_those_that_are_counted(condition: Any, router: Any) -> None:
    settings = LahrSettings(lahr_condition=condition, lahr_router=router)
    with torch.device("meta"):
        model = undrawn_model("lahr", **SMALL, lahr=settings)
    for batch in (6,) if condition == "full" else (1,):  # 6: rows of which some think on
        assert flops_per_token(model.config, 48, batch) == measure_flops_per_token(model, 48, batch)


def test_the_baseline_costs_what_a_dense_llama_costs() -> None:
    with torch.device("meta"):
        dense = undrawn_model("llama", **SMALL)
    baseline = without_numbers("baseline")
    assert flops_per_token(baseline.config, 48) == flops_per_token(dense.config, 48)
    names = {name: tuple(p.shape) for name, p in dense.named_parameters()}
    assert {name: tuple(p.shape) for name, p in baseline.named_parameters()} == names


def test_the_sizes_on_the_page_are_the_models_own() -> None:
    rows = []
    for name, size in SIZES.items():
        counts = [
            parameters(condition, **{**size, "vocab_size": vocabulary}) / 1e6
            for condition, vocabulary in (("baseline", 4096), ("full", 4096), ("full", 50257))
        ]
        shape = f"{size['n_layer']} | {size['n_embd']} | {size['n_head']} | {size['context_length']:,}"
        rows.append(f"| {name} | {shape} | " + " | ".join(f"{count:.1f} M" for count in counts) + " |")
    match = re.search(r"<!-- sizes[^>]*-->\n(.*)<!-- /sizes -->", PAGE.read_text(), re.DOTALL)
    assert match is not None
    assert match[1].splitlines()[2:] == rows, "paste the right side into docs/adaptive.md"


def test_arms_of_one_seed_share_the_numbers_of_every_tensor_that_both_have() -> None:
    models = [
        build_model("lahr", final_depth=4, seed=3, **SMALL, lahr=LahrSettings(lahr_condition=condition))
        for condition in ("baseline", "mod_only", "full")
    ]
    first = dict(models[0].named_parameters())
    for other in map(dict, (model.named_parameters() for model in models[1:])):
        assert first.keys() < other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert "routing" not in " ".join(first)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lahr.capacity": 0}, "capacity is 0"),
        ({"lahr.capacity": 1.5}, "capacity is 1.5"),
        ({"lahr.iterations": 0}, "iterations is 0"),
        ({"lahr.halt_q": 2}, "halt_q is 2"),
        ({"lahr.memory_top_k": 99}, "top_k is 99"),
        ({"lahr.condition": "half"}, "lahr_condition is 'half'"),
        ({"n_layer": 3}, "n_layer is 3"),
        ({"arch": "llama", "lahr.every": 3}, "lahr_every is for --arch lahr"),
        ({"n_embd": 12, "n_head": 4}, "rotary positions need an even one"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        resolve("recommended", {}, {"arch": "lahr", **given})


def test_a_size_is_a_shape_and_no_growth_and_gives_way_to_what_is_said() -> None:
    config = merge("recommended", {}, {"size": "small", "n_head": 4})
    assert (config.n_layer, config.max_layers, config.n_embd, config.n_head) == (8, 8, 256, 4)
    assert config.trigger == "never"
    grown = merge("recommended", {}, {"size": "small", "n_layer": 4, "trigger": "fixed"})
    assert (grown.n_layer, grown.max_layers, grown.trigger) == (4, 8, "fixed")


def test_names_with_a_dot_and_with_an_underscore_are_one_setting() -> None:
    both = [merge("recommended", {}, {name: 0.25}) for name in ("lahr.capacity", "lahr_capacity")]
    assert both[0] == both[1]
    assert both[0].lahr_capacity == 0.25


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model that grew from two layers to four, a routed pair at a time."""
    folder = tmp_path_factory.mktemp("lahr")
    given = {
        "arch": "lahr",
        **{name: value for name, value in SMALL.items() if name != "eos_token_id"},
        "n_layer": 2,
        "max_layers": 4,
        "trigger": "fixed",
        "growth_fractions": [0.5],
        "lahr.capacity": 0.25,
        "lahr.iterations": 2,
        "lahr.memory_keys": 4,
        "lahr.memory_heads": 1,
        "lahr.memory_top_k": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 30,
        "batch_size": 4,
        "eval_interval_steps": 10,
        "eval_batches": 2,
        "device": "cpu",
        "dataset_path": str(write_corpus(folder / "words.txt")),
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
    }
    train(resolve("recommended", {}, given))
    return folder / "run"


def test_a_run_learns_grows_and_records_what_tokens_cost(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("kind", row.get("event")) == "eval"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    for row in rows:
        assert 0 < row["eval_capacity"] < 1
        assert 1 <= row["eval_iterations"] <= 2
        assert 0 <= row["eval_memory_dead"] < 1
    config = json.loads((trained / "final" / "config.json").read_text())
    assert config["routed_layers"] == [False, True, False, True]


def test_a_run_s_model_generates_and_halt_q_changes_how_long_it_thinks(trained: Path) -> None:
    model = load_model(trained / "final").eval()
    ids = torch.arange(1, 25)[None]
    iterations = []
    for halt_q in (0.0, 1.0):
        set_halt_q(model, halt_q)
        model.reset_compute_figures()
        model(input_ids=ids)
        iterations.append(model.compute_figures()["iterations"])
    assert iterations == [1.0, 2.0]
    texts = [generate(trained, "the", max_new_tokens=12, temperature=0, halt_q=q) for q in (None, 0.5)]
    assert texts[0] == texts[1]  # 0.5 is what it was trained with


def test_halt_q_is_refused_for_a_model_that_does_not_halt() -> None:
    model = build_model("llama", final_depth=4, seed=0, **SMALL)
    with pytest.raises(ValueError, match="no latent block"):
        set_halt_q(model, 0.5)


def test_the_memory_s_table_has_a_learning_rate_of_its_own() -> None:
    model = build_model("lahr", final_depth=4, seed=0, **SMALL, lahr=LahrSettings())
    optimizer = build_optimizer(
        model, "model.layers", name="muon", lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), table_lr=3.0
    )
    named = {id(p): name for name, p in model.named_parameters()}
    groups = [({named[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups]
    ((_, table),) = [each for each in groups if each[0] == {"model.memory.values.weight"}]
    assert (table["lr"], table["weight_decay"]) == (pytest.approx(0.3), 0.0)
    ((muon, _),) = [each for each in groups if each[1]["algorithm"] == "muon"]
    assert "model.latent.block.mlp.up_proj.weight" in muon
    assert sorted(name for names, _ in groups for name in names) == sorted(named.values())


def test_the_report_shows_where_computation_went_in_its_sample(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    trace = rows[-1]["trace"]
    assert "".join(trace["pieces"]) == rows[-1]["text"][: len("".join(trace["pieces"]))]
    assert trace["layers"] == [1, 3]
    assert {len(row) for row in trace["processed"]} == {len(trace["pieces"])} == {len(trace["iterations"])}
    assert set(trace["iterations"]) <= {1, 2}
    page = (trained / "report.html").read_text()
    assert page.count('class="sample trace"') == 2 * len(rows)
    used = sum(map(sum, trace["processed"]))
    assert 0 < used < 2 * len(trace["pieces"])


def test_a_trace_is_what_the_layers_did(trained: Path) -> None:
    model = load_model(trained / "final").eval()
    ids = torch.arange(1, 41)
    trace = trace_tokens(model, ids)
    model.reset_compute_figures()
    model(input_ids=ids[None])
    figures = model.compute_figures()
    assert figures["capacity"] == pytest.approx(sum(map(sum, trace.processed)) / (2 * 40))
    assert figures["iterations"] == pytest.approx(sum(trace.iterations) / 40)
    assert trace_tokens(model, ids[:20]).processed == tuple(row[:20] for row in trace.processed)
