from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiether.training.coerce import coerce
from aiether.training.config import (
    PRESETS,
    RangeWarning,
    TrainConfig,
    merge,
    read_config,
    read_file,
    resolve,
    setting_types,
    write_config,
)

BEYOND = {
    "beta0": (0.04, 0.6),
    "gamma0": (0.0, 0.4),
    "eta0": (0.0, 0.2),
    "k_subspace": (4, 31),
    "ell_orth": (2, 11),
}
EDGES = {
    "beta0": (0.05, 0.5),
    "gamma0": (0.05, 0.3),
    "eta0": (0.01, 0.1),
    "k_subspace": (5, 30),
    "ell_orth": (3, 10),
}


def test_the_report_preset_is_the_class_defaults() -> None:
    assert resolve("report", {}, {}) == TrainConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works_and_is_recorded(preset: str) -> None:
    config = merge(preset, {}, {})
    config.validate()
    assert config.preset == preset
    assert config.out_of_range() == []
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value


def test_flags_win_over_the_file_and_the_file_over_the_preset() -> None:
    config = resolve("recommended", {"lr": 0.25, "n-head": 2}, {"lr": 0.5})
    assert (config.lr, config.n_head) == (0.5, 2)
    assert config.n_embd == PRESETS["recommended"]["n_embd"]


def test_the_preset_comes_from_the_caller_else_the_file_else_is_ours() -> None:
    assert resolve("report", {"preset": "large"}, {}).preset == "report"
    assert resolve(None, {"preset": "large"}, {}).preset == "large"
    assert resolve(None, {}, {}).preset == "recommended"


def test_epochs_given_are_not_overruled_by_the_steps_of_a_lower_layer() -> None:
    assert PRESETS["recommended"]["max_steps"] is not None
    assert resolve("recommended", {}, {"num_epochs": 2}).max_steps is None
    assert resolve("recommended", {"max_steps": 7}, {"num_epochs": 2}).max_steps is None
    assert resolve("recommended", {"num_epochs": 2}, {"max_steps": 7}).max_steps == 7


def test_one_length_replaces_another_of_a_lower_layer_and_two_of_one_layer_are_refused() -> None:
    for name in ("max_tokens", "max_flops", "max_seconds"):
        config = resolve("recommended", {}, {name: 5})
        assert (config.max_steps, getattr(config, name)) == (None, 5)
        config = resolve("recommended", {name: 5}, {"max_steps": 7})
        assert (config.max_steps, getattr(config, name)) == (7, None)
        assert getattr(resolve("recommended", {name: 5}, {"num_epochs": 2}), name) is None
        assert resolve("recommended", {name: None}, {}).max_steps == PRESETS["recommended"]["max_steps"]
    with pytest.raises(ValueError, match=r"max_steps \(7\) and max_flops \(1e\+12\) both say how long"):
        resolve("recommended", {}, {"max_steps": 7, "max_flops": 1e12})


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [("lrr", 1, "'lr'"), ("n_layers", 3, "'n_layer'"), ("beta_0", 0.1, "'beta0'")],
)
def test_unknown_settings_are_refused_with_the_nearest_name(name: str, value: Any, nearest: str) -> None:
    for file, flags in (({name: value}, {}), ({}, {name: value})):
        with pytest.raises(ValueError, match=f"unknown setting '{name}'; did you mean {nearest}"):
            resolve("report", file, flags)


def test_an_unknown_preset_is_refused_with_all_names() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'reports'; did you mean 'report'\? It is one of"):
        resolve("reports", {}, {})


def test_one_setting_spelt_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="n_layer is given twice"):
        resolve("report", {"n_layer": 3, "n-layer": 4}, {})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lr", "fast", "a number"),
        ("lr", True, "a number"),
        ("n_layer", 2.5, "a whole number"),
        ("n_layer", None, "a whole number"),
        ("bf16", 1, "true or false"),
        ("optimizer", "sgd", "adamw, muon"),
        ("grow_to", [4, "x"], "a list"),
        ("k_subspace", "many", "'auto'"),
        ("dataset_path", 3, "text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*{allowed}"):
        resolve("report", {name: value}, {})


@pytest.mark.parametrize(
    ("hint", "spelt", "value"),
    [
        (float, "1e-3", 1e-3),
        (float, 3, 3.0),
        (int, 4.0, 4),
        (int | None, "None", None),
        (str | None, "None", None),
        (str | None, "none.txt", "none.txt"),
        (bool, "no", False),
        (tuple[int, ...], [4, "8"], (4, 8)),
        (tuple[float, ...], 0.5, (0.5,)),
    ],
)
def test_values_take_the_declared_type(hint: Any, spelt: Any, value: Any) -> None:
    taken = coerce("x", spelt, hint)
    assert taken == value
    assert type(taken) is type(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0: it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0: it must be greater than 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be from 0 to below 1"),
        ({"decay_fraction": 1.5}, "decay_fraction is 1.5"),
        ({"n_head": 5}, "not a multiple of n_head"),
        ({"arch": "llama", "n_embd": 6, "n_head": 2}, "even"),
        ({"max_layers": 3}, "raise max_layers or start smaller"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"pg_patience": 0}, "pg_patience is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_flops": -1e9}, "max_flops is -1000000000.0: it must be greater than 0"),
        ({"max_seconds": float("inf")}, "max_seconds is inf"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("report", {}, settings)


@pytest.mark.parametrize("name", BEYOND)
def test_outside_a_documented_range_there_is_a_warning_and_at_its_edges_none(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    for value in EDGES[name]:
        resolve("report", {}, {name: value})
    assert [warning for warning in recwarn if issubclass(warning.category, RangeWarning)] == []
    for value in BEYOND[name]:
        with pytest.warns(RangeWarning, match=f"{name} is {value}, outside the documented range"):
            resolve("report", {}, {name: value})


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = resolve("recommended", {}, {"grow_to": [3, 8], "lr": 1e-5, "dataset_path": "a: b\n#c"})
    write_config(tmp_path / "config.yaml", config)
    assert read_config(tmp_path / "config.yaml") == config
    assert resolve(None, read_file(tmp_path / "config.yaml"), {}) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1", "line 1, column 7: expected"),
        ("- lr", "holds no settings"),
        ("rate: 1", "unknown setting 'rate'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)run\.yaml.*{message}"):
        read_file(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_file(tmp_path / "other.yaml")


def test_yaml_reads_bare_exponents_as_text_and_we_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nmax-layers: 12\n")
    assert read_file(path) == {"lr": 1e-3, "max_layers": 12}
    path.write_text("")
    assert read_file(path) == {}


def test_every_setting_has_a_type_that_its_default_fits() -> None:
    config = TrainConfig()
    for name, hint in setting_types().items():
        assert coerce(name, getattr(config, name), hint) == getattr(config, name)


def test_several_sources_are_paths_each() -> None:
    resolve("recommended", {}, {"dataset_path": ["a.txt", "b/"]}).validate()
    with pytest.raises(ValueError, match=r"dataset_path is ''"):
        resolve("recommended", {}, {"dataset_path": ["a.txt", ""]}).validate()
