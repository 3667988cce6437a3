"""A study's specification: what it may say, and what is refused before anything runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.study.fakes import write_lines

from aiether.study.arms import Cell, cell_config, cells, tuning_cells
from aiether.study.catalogue import find_spec, shipped_names
from aiether.study.check import check_spec
from aiether.study.results import deciding_evaluation, spec_hash
from aiether.study.spec import plain, presets_of, read_spec, spec_from
from aiether.training.settings_file import read_settings_file

STUDY: dict[str, Any] = {
    "name": "small",
    "question": "Does it grow?",
    "baseline": "static",
    "seeds": 3,
    "budget": {"steps": 20},
    "eval_windows": 8,
    "base": {"preset": "recommended", "n_head": 2, "n_embd": 32, "context_length": 32, "batch_size": 4},
    "conditions": {
        "static": {"settings": {"n_layer": 2, "max_layers": 2, "trigger": "never"}},
        "grown": {"about": "1 to 2", "settings": {"n_layer": 1, "max_layers": 2}},
    },
}


def study(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(STUDY), **changes}


def condition(**settings: Any) -> dict[str, Any]:
    return {**copy.deepcopy(STUDY["conditions"]), "other": {"settings": settings}}


def checked(content: dict[str, Any], preset: str | None = None) -> None:
    check_spec(spec_from(content, preset))


def test_a_specification_says_which_runs_there_are_seed_by_seed() -> None:
    spec = spec_from(study(lengths=[1.0, 0.5, 0.7], seeds=[4, 2]))
    found = [(cell.seed, cell.condition, cell.length) for cell in cells(spec, {})]
    static = [("static", length) for length in (0.5, 0.7, 1.0)]
    assert found == [(seed, *arm) for seed in (4, 2) for arm in (*static, ("grown", 1.0))]
    assert len({cell.folder for cell in cells(spec, {})}) == len(found)


def test_an_arm_has_the_base_s_settings_its_own_and_the_study_s() -> None:
    spec = spec_from(study(lengths=[0.5, 0.7, 1]))
    config = cell_config(spec, Cell("static", 0.5, 7, lr=0.25))
    assert (config.n_layer, config.n_embd, config.optimizer) == (2, 32, "muon")
    assert (config.max_steps, config.seed, config.lr, config.eval_batches) == (10, 7, 0.25, 2)


def test_factors_make_every_combination() -> None:
    factors = {
        "deep": {False: {"n_layer": 1}, True: {"n_layer": 2}},
        "wide": {"no": {}, "yes": {"n_embd": 64}},
    }
    spec = spec_from(study(conditions={}, baseline=None, factors=factors))
    names = ["deep.off+wide.no", "deep.off+wide.yes", "deep.on+wide.no", "deep.on+wide.yes"]
    assert list(spec.all_conditions()) == names
    config = cell_config(spec, Cell("deep.on+wide.yes", 1.0, 0))
    assert (config.n_layer, config.n_embd) == (2, 64)


def test_a_preset_changes_some_keys_and_takes_others_out() -> None:
    content = study(
        presets={"short": {"budget": {"tokens": 2560}, "seeds": 2, "conditions": {"grown": None}}}
    )
    spec = spec_from(content, "short")
    assert (spec.budget_unit, spec.budget, spec.seeds) == ("tokens", 2560.0, (0, 1))
    assert list(spec.conditions) == ["static"]


def test_learning_rates_are_tuned_on_a_seed_of_their_own_for_every_condition() -> None:
    spec = spec_from(study(tuning={"lr": [1e-3, 2e-3]}))
    found = [(cell.condition, cell.lr, cell.seed) for cell in tuning_cells(spec)]
    assert found == [(name, lr, 1000) for name in ("static", "grown") for lr in (1e-3, 2e-3)]


def test_what_is_written_is_read_as_the_same_study(tmp_path: Path) -> None:
    content = study(
        lengths=[0.5, 0.7, 1],
        tuning={"lr": [1e-3, 2e-3]},
        comparisons=[{"arm": "grown", "against": "static"}],
        factors={"f": {"off": {}, "on": {"n_embd": 64}}},
    )
    content["conditions"]["static"]["claims"] = {"final_depth": 2, "absent": ["router"]}
    spec = spec_from(content)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plain(spec), sort_keys=False))
    assert read_spec(path) == spec
    assert spec_hash(read_spec(path)) == spec_hash(spec)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sedes": 3}, "unknown key 'sedes'; did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": 0}, "from 1 to 1000"),
        ({"budget": {"hours": 3}}, "unknown budget 'hours'"),
        ({"budget": {"steps": 3, "tokens": 4}}, "one of steps, tokens, flops, seconds"),
        ({"budget": {"tokens": 0}}, "greater than 0"),
        ({"lengths": [0.5, 0.7]}, "1 must be among them"),
        ({"lengths": [0.5, 1.0]}, "at least three"),
        ({"baseline": "statik"}, "unknown condition 'statik'; did you mean 'static'"),
        ({"baseline": None, "lengths": [0.5, 0.7, 1.0]}, "name one with baseline"),
        ({"comparisons": [{"arm": "grown", "against": "grown"}]}, "with itself"),
        ({"comparisons": [{"arm": "grown", "against": "static"}] * 2}, "twice"),
        ({"comparisons": [{"arm": "grown"}]}, "lacks a key"),
        ({"conditions": {}}, "no conditions"),
        ({"conditions": {"a b": {}}}, "a name has"),
        ({"conditions": {"a": {"n_layer": 3}}}, "unknown key 'n_layer'"),
        ({"factors": {"f": {"one": {}}}}, "two are meant"),
        ({"tuning": {"lr": [1e-3]}}, "at least two"),
        ({"tuning": {"lr": [1e-3, 2e-3], "seed": 1}}, "one of the study's seeds"),
        ({"alpha": 2}, "alpha is 2"),
        ({"metric": "accuracy"}, "metric is 'accuracy'"),
        ({"eval_windows": 0}, "at least 1"),
        ({"name": "../out"}, "a name has"),
        ({"question": None}, "question"),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec_from(study(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": {"n_embedding": 3}}, "condition static: unknown setting 'n_embedding'"),
        ({"base": {"max_steps": 3}}, "max_steps comes from budget"),
        ({"conditions": condition(seed=3)}, "condition other: seed comes from seeds"),
        (
            {"conditions": condition(n_layer=2, max_layers=2, trigger="never")},
            "static and other do not differ",
        ),
        ({"conditions": condition(vocab_size=999)}, "losses on other text or other tokens"),
        ({"conditions": condition(dataset_path="elsewhere")}, "losses on other text"),
        ({"conditions": condition(batch_size=3)}, "no multiple of batch_size 3"),
        ({"conditions": condition(n_embd=33)}, "condition other: n_embd is 33"),
        ({"seeds": 1}, "one seed tests nothing"),
        ({"seeds": 5, "test": "sign_flip"}, r"never give p below 0\.0625; .* takes 6 seeds"),
        ({"seeds": 6, "test": "sign_flip", "conditions": condition(n_embd=64)}, "takes 7 seeds"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused_before_anything_runs(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        checked(study(**changes))


def test_a_factorial_counts_all_its_effects() -> None:
    factors = {name: {"off": {}, "on": {name: value}} for name, value in (("lr", 0.1), ("noise", 0.1))}
    factors["weight_decay"] = {"off": {}, "on": {"weight_decay": 0.3}}
    content = study(conditions={}, baseline=None, factors=factors, test="sign_flip")
    with pytest.raises(ValueError, match=r"with 7 planned .* takes 9 seeds"):
        checked({**content, "seeds": 8})
    checked({**content, "seeds": 9})


def test_an_arm_that_is_a_baseline_itself_is_still_compared() -> None:
    conditions = condition(n_embd=64)
    conditions["other"]["baseline"] = "grown"
    spec = spec_from(study(conditions=conditions))
    assert [(each.arm, each.against) for each in spec.planned()] == [("grown", "static"), ("other", "grown")]


def test_a_specification_in_python_is_checked_too() -> None:
    spec = replace(spec_from(study()), seeds=(0, 0, 1))
    with pytest.raises(ValueError, match="different whole numbers"):
        check_spec(spec)


def test_a_preset_cannot_take_out_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'grovn', which is not there: .* did you mean 'grown'"):
        spec_from(study(presets={"short": {"conditions": {"grovn": None}}}), "short")


def test_six_seeds_are_enough_for_one_sign_flip_test() -> None:
    checked(study(seeds=6, test="sign_flip"))
    checked(study(conditions=condition(n_layer=1, max_layers=2), allow_identical_arms=True))


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_study_makes_sense_under_each_of_its_presets(name: str) -> None:
    from aiether.study.catalogue import find_file

    presets = presets_of(read_settings_file(find_file(name)))
    assert {"cpu", "gpu"} <= presets.keys()
    for preset in presets:
        spec = find_spec(name, preset)
        assert (spec.name, spec.preset) == (name, preset)
        check_spec(spec)


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'growth_vs_static'"):
        find_spec("growth_vs_statik")
    with pytest.raises(ValueError, match=r"'a/b.yaml' does not exist"):
        find_spec("a/b.yaml")


def test_a_run_is_judged_by_its_last_evaluation_or_by_its_lowest(tmp_path: Path) -> None:
    losses = {100: 3.0, 200: 2.5, 300: 2.75}
    rows = [{"kind": "eval", "step": step, "eval_loss": loss} for step, loss in losses.items()]
    write_lines(tmp_path / "metrics.jsonl", [*rows, {"kind": "train", "step": 310, "loss": 0.1}])
    found = {}
    for judged in ("last", "best"):
        decides = deciding_evaluation(spec_from(study(judged=judged)), tmp_path)
        assert decides is not None
        found[judged] = decides["step"]
    assert found == {"last": 300, "best": 200}
    with pytest.raises(ValueError, match="judged"):
        checked(study(judged="median"))
