"""The runner: what is missing runs, what failed is tried once more, nothing is dropped without a word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.study.fakes import FakeWorkers, Silent
from tests.study.test_spec import study

from aiether.integrations import hold
from aiether.study.cell import Outcome
from aiether.study.pool import Order
from aiether.study.runner import StudyResult, report_study, run_study, worker_shape
from aiether.study.spec import read_spec, spec_from
from aiether.study.state import study_state
from aiether.training.config import PRESETS

SPENT = (143_616 + 229_632) / 2 / 229_632
"""FLOPs of the grown arm, half of its steps with one layer, over the static one's."""


def loss(condition: str, length: float, seed: int) -> float:
    """The baseline falls by 0.5 from half the budget to all of it; the other arm is 0.1 below."""
    base = 4.0 - 0.5 * math.log(length / 0.5) / math.log(2) + 0.01 * seed
    return base if condition == "static" else base - 0.1 - 0.001 * seed


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a small text" for number in range(4000)))
    found = study(lengths=[0.5, 0.7, 1.0])
    found["base"] |= {"dataset_path": str(text), "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
    return found


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and its figures take seconds."""
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder / "results.json")


def run(content: dict[str, Any], folder: Path, workers: FakeWorkers) -> StudyResult:
    return run_study(spec_from(content), folder, Silent(), backend=lambda threads: workers)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_every_run_is_done_once_and_a_second_call_runs_nothing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    folder, workers = tmp_path / "study", FakeWorkers(loss)
    assert run(content, folder, workers).exit_status == 0
    arms = ["static/0.5", "static/0.7", "static/1", "grown/1"]
    assert workers.folders() == [f"{arm}-seed{seed}" for seed in range(3) for arm in arms]
    first = (folder / "results.json").read_bytes()
    again = FakeWorkers(loss)
    assert run(content, folder, again).exit_status == 0
    assert again.orders == []
    assert (folder / "results.json").read_bytes() == first
    assert study_state(folder).count("finished") == 12


def test_comparisons_and_savings_are_those_of_the_records(content: dict[str, Any], tmp_path: Path) -> None:
    run(content, tmp_path / "study", FakeWorkers(loss))
    found = results(tmp_path / "study")
    (comparison,) = found["comparisons"]
    assert comparison["differences"] == pytest.approx([-0.1, -0.101, -0.102])
    assert comparison["verdict"].startswith("lower by 0.101")
    flops = next(row for row in found["savings"] if row["cost"] == "flops")
    # The grown arm lies below the baseline's longest run: no length reaches its loss.
    assert (flops["savings"], flops["beyond"], flops["mean"]) == ([None] * 3, 3, None)
    better = "(3 of 3 seeds better than the baseline's longest run)"
    assert flops["verdict"] == f"at least {1 - SPENT:.0%} fewer FLOPs {better}"
    equal = next(row for row in found["equal_cost"] if row["cost"] == "flops")
    # Half its steps with one layer: the curve stands at 4 - 0.5 log2(2 * SPENT) there.
    expected = [3.4 - 0.001 * s - (4.0 - 0.5 * math.log2(2 * SPENT)) for s in range(3)]
    assert equal["differences"] == pytest.approx(expected, abs=1e-3)


def test_a_saving_is_read_off_the_baseline_s_own_curve(content: dict[str, Any], tmp_path: Path) -> None:
    def equal_at_the_end(condition: str, length: float, seed: int) -> float:
        return loss("static", length if condition == "static" else 0.9, seed)

    run(content, tmp_path / "study", FakeWorkers(equal_at_the_end))
    flops = next(row for row in results(tmp_path / "study")["savings"] if row["cost"] == "flops")
    assert flops["savings"] == pytest.approx([1 - SPENT / 0.9] * 3, abs=0.01)
    assert flops["verdict"].startswith("10 ± ")
    assert flops["verdict"].endswith(" % fewer FLOPs over 3 seeds")


def test_a_failed_run_is_tried_once_more_and_then_reported(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    fails = {"grown/1-seed1": ["no memory", "no memory again"], "static/1-seed0": ["killed"]}
    workers = FakeWorkers(loss, fails)
    result = run(content, folder, workers)
    assert workers.folders().count("grown/1-seed1") == workers.folders().count("static/1-seed0") == 2
    assert (result.exit_status, list(result.failures.values())) == (3, ["no memory again"])
    found = results(folder)
    (comparison,) = found["comparisons"]
    assert (comparison["n"], comparison["seeds"]) == (2, [0, 2])
    assert [(row["condition"], row["seed"], row["reason"]) for row in found["failures"]] == [
        ("grown", 1, "no memory again")
    ]
    assert study_state(folder).count("failed") == 1
    again = FakeWorkers(loss)
    assert run(content, folder, again).exit_status == 0
    assert again.folders() == ["grown/1-seed1"]
    assert results(folder)["failures"] == []


def test_an_interrupted_study_goes_on_where_it_was(content: dict[str, Any], tmp_path: Path) -> None:
    folder, workers = tmp_path / "study", FakeWorkers(loss, stop_at=5)
    result = run(content, folder, workers)
    assert (result.status, result.exit_status, result.report) == ("interrupted", 130, None)
    done = study_state(folder).count("finished")
    again = FakeWorkers(loss)
    run(content, folder, again)
    assert len(again.orders) == 12 - done
    assert 0 < done < 12


def test_each_condition_is_run_at_the_rate_that_tuning_chose(content: dict[str, Any], tmp_path: Path) -> None:
    content |= {"tuning": {"lr": [0.001, 0.002, 0.004]}, "lengths": [1.0]}
    workers = FakeWorkers(loss)
    run(content, tmp_path / "study", workers)
    assert len(workers.orders) == 2 * 3 + 2 * 3
    assert {order.settings["lr"] for order in workers.orders[6:]} == {0.002}
    (static, _) = results(tmp_path / "study")["tuning"]
    assert (static["chosen"], static["at_edge"]) == (0.002, False)


def test_a_condition_that_could_not_be_tuned_is_not_run_at_a_rate_of_its_own(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content |= {"tuning": {"lr": [0.001, 0.002]}, "lengths": [1.0]}
    fails = {f"grown/1-lr{lr}-seed1000": ["diverged", "diverged"] for lr in (0.001, 0.002)}
    workers = FakeWorkers(loss, fails)
    result = run(content, tmp_path / "study", workers)
    assert not any("grown" in folder and "seed1000" not in folder for folder in workers.folders())
    reasons = [reason for folder, reason in result.failures.items() if "seed1000" not in folder]
    assert reasons == ["no learning rate: all runs of its tuning failed"] * 3
    before = results(tmp_path / "study")["failures"]
    report_study(tmp_path / "study")
    assert results(tmp_path / "study")["failures"] == before


def test_a_folder_holds_one_study(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    run(content, folder, FakeWorkers(loss))
    with pytest.raises(ValueError, match="differs in seeds, budget"):
        run({**content, "seeds": 4, "budget": {"steps": 30}}, folder, FakeWorkers(loss))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no study"):
        run(content, tmp_path / "other", FakeWorkers(loss))


def test_claims_are_checked_before_anything_runs(content: dict[str, Any], tmp_path: Path) -> None:
    workers = FakeWorkers(loss)
    for claims, says in (
        ({"final_depth": 3}, r"claims final_depth \(3\) and ends with 2"),
        ({"absent": ["attn"]}, "claims to have no 'attn' and has transformer.h.0.attn"),
        ({"present": ["router"]}, "no tensor's name holds it"),
        ({"parameters": 12}, r"claims parameters \(12\)"),
    ):
        content["conditions"]["static"]["claims"] = claims
        with pytest.raises(ValueError, match=says):
            run(content, tmp_path / "study", workers)
    assert workers.orders == []


def test_a_run_that_did_not_become_what_its_condition_claims_does_not_count(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["conditions"]["grown"]["settings"]["max_layers"] = 3  # and the records end with 2 layers
    content["conditions"]["grown"]["claims"] = {"final_depth": 3}
    result = run(content, tmp_path / "study", FakeWorkers(loss))
    assert result.exit_status == 3
    assert set(result.failures.values()) == {"it ended with 2 layers, and the condition claims 3"}
    assert results(tmp_path / "study")["comparisons"][0]["n"] == 0


def test_arms_of_unequal_size_cannot_claim_to_be_equal(content: dict[str, Any], tmp_path: Path) -> None:
    content["conditions"]["grown"]["claims"] = {"same_parameters_as": "static", "same_flops_as": "static"}
    run(content, tmp_path / "equal", FakeWorkers(loss))
    content["conditions"]["grown"]["settings"]["max_layers"] = 3
    with pytest.raises(ValueError, match="claims same_parameters_as static"):
        run(content, tmp_path / "unequal", FakeWorkers(loss))


def test_too_little_validation_text_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_windows is 40000, the validation text holds \d+"):
        run({**content, "eval_windows": 40000}, tmp_path / "study", FakeWorkers(loss))


def test_runs_of_other_settings_or_other_text_are_not_paired_with_new_ones(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    run(content, folder, FakeWorkers(loss, stop_at=5))
    monkeypatch.setitem(PRESETS["recommended"], "weight_decay", 0.7)
    with pytest.raises(ValueError, match=r"differs .* in weight_decay \(0.1, now 0.7\)"):
        run(content, folder, FakeWorkers(loss))
    monkeypatch.undo()
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder)
    text = Path(content["base"]["dataset_path"])
    text.write_text(text.read_text().replace("line 7 ", "line seven "))
    with pytest.raises(ValueError, match="would run now in its data"):
        run(content, folder, FakeWorkers(loss))


def test_what_killed_runners_left_behind_does_not_stand_in_the_way(
    content: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / ".study.yaml.tmp").write_text("name: ha")
    run(content, folder, FakeWorkers(loss, stop_at=3))
    with (folder / "attempts.jsonl").open("a") as file:
        file.write('{"folder": "cells/gro')
    run(content, folder, FakeWorkers(loss, {"grown/1-seed1": ["no", "no"]}))
    assert study_state(folder).count("failed") == 1
    assert run(content, folder, FakeWorkers(loss)).exit_status == 0


def test_a_run_that_was_whole_when_its_process_died_is_finished(
    content: dict[str, Any], tmp_path: Path
) -> None:
    class Dying(FakeWorkers):
        def wait(self, timeout_s: float) -> list[tuple[Order, Outcome]]:
            return [(order, Outcome("failed", "killed")) for order, _ in super().wait(timeout_s)]

    workers = Dying(loss)
    assert run(content, tmp_path / "study", workers).exit_status == 0
    assert len(workers.orders) == 12


def test_going_on_by_the_folder_changes_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    content["presets"] = {"cpu": {"base": {"device": "cpu"}}}
    told = "aiether study run small --preset cpu"
    workers = FakeWorkers(loss, stop_at=4)
    run_study(spec_from(content, "cpu"), folder, backend=lambda threads: workers, command=told)
    run_study(read_spec(folder / "study.yaml"), folder, backend=lambda threads: FakeWorkers(loss))
    assert (results(folder)["study"]["command"], results(folder)["study"]["preset"]) == (told, "cpu")


def test_a_seed_without_a_curve_of_its_own_is_counted_as_missing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    def within(condition: str, length: float, seed: int) -> float:
        return loss("static", length if condition == "static" else 0.9, seed)

    fails = {"static/0.5-seed1": ["no", "no"]}
    run(content, tmp_path / "study", FakeWorkers(within, fails))
    flops = next(row for row in results(tmp_path / "study")["savings"] if row["cost"] == "flops")
    assert (flops["n"], flops["seeds"], flops["savings"][1]) == (2, [0, 1, 2], None)
    assert "1 seed outside the baseline's curve" in flops["verdict"]


def test_an_unfinished_study_has_a_report_too(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    run(content, folder, FakeWorkers(loss, stop_at=5))
    assert report_study(folder).is_file()
    statuses = [cell["status"] for arm in results(folder)["arms"] for cell in arm["cells"]]
    assert {"finished", "missing"} == set(statuses)


def test_an_arm_that_stayed_small_is_told_by_what_it_was_not_by_what_was_planned(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["conditions"]["grown"]["settings"]["max_layers"] = 3  # and the records end with 2 layers
    run(content, tmp_path / "study", FakeWorkers(loss))
    grown = next(arm for arm in results(tmp_path / "study")["arms"] if arm["condition"] == "grown")
    assert grown["depth"] == {"start": 1, "end": 2, "planned": 3, "ended": [2, 2, 2]}
    assert grown["flops_per_token"] == {"start": 143_616, "end": 229_632}


def test_effects_of_a_factorial_leave_out_a_seed_that_lacks_a_run(
    content: dict[str, Any], tmp_path: Path
) -> None:
    def additive(condition: str, length: float, seed: int) -> float:
        return 4.0 - 0.1 * ("deep.on" in condition) + 0.3 * ("wide.on" in condition) + 0.01 * seed

    factors = {"deep": {"off": {}, "on": {"lr": 0.01}}, "wide": {"off": {}, "on": {"weight_decay": 0.3}}}
    del content["lengths"]
    content |= {"conditions": {}, "baseline": None, "factors": factors, "seeds": 4}
    fails = {"deep.on+wide.off/1-seed2": ["no", "no"]}
    run(content, tmp_path / "study", FakeWorkers(additive, fails))
    effects = {row["effect"]: row for row in results(tmp_path / "study")["factorial"]}
    assert effects["deep"]["differences"] == pytest.approx([-0.1] * 3)
    assert effects["wide"]["differences"] == pytest.approx([0.3] * 3)
    assert effects["deep x wide"]["differences"] == pytest.approx([0.0] * 3, abs=1e-12)
    assert (effects["deep"]["seeds"], effects["deep"]["left_out"]) == ([0, 1, 3], [2])


def test_a_folder_keeps_the_threads_that_its_first_runs_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiether.study.runner._cores", lambda: 8)
    assert worker_shape(tmp_path, {}, 2) == (2, 4)
    assert worker_shape(tmp_path, {}, None) == (1, 4)
    with pytest.raises(ValueError, match="workers is 0"):
        worker_shape(tmp_path, {}, 0)


def test_a_run_under_way_is_seen_from_elsewhere(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    run(content, folder, FakeWorkers(loss, stop_at=5))
    state = study_state(folder)
    assert (state.is_running, state.count("running"), state.count("waiting")) == (False, 0, 12 - 4)
    begun = folder / "cells" / "grown" / "1-seed2"
    begun.mkdir(parents=True)
    (begun / "config.yaml").write_text("")
    assert study_state(folder).count("stopped") == 1
    with hold(begun), hold(folder):
        state = study_state(folder)
    assert (state.is_running, state.count("running"), state.count("waiting")) == (True, 1, 12 - 5)
    assert state.time_left() is not None
