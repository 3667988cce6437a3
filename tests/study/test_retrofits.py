"""Studies of retrofitted models: one model is trained, each run converts and tunes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.study.fakes import Silent
from tests.study.recompute import check
from tests.study.test_spec import study
from transformers import AutoModelForCausalLM

import aiether
from aiether.retrofitting.arm_settings import arm_settings, tuning_of
from aiether.study.arms import Cell, cell_config, pretrain_config, retrofit_of
from aiether.study.cell import Outcome, run_cell
from aiether.study.check import check_spec
from aiether.study.pool import Order
from aiether.study.pretraining import pretrain
from aiether.study.report import write_study_report
from aiether.study.runner import run_study
from aiether.study.spec import plain, spec_from


class InTurn:
    """Runs each order in this process when somebody waits; `stop_before` raises at the n-th order."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.slots, self.done, self.stop_before = 1, [], stop_before
        self._orders: list[Order] = []

    def submit(self, order: Order) -> None:
        if self.stop_before is not None and len(self.done) == self.stop_before:
            raise KeyboardInterrupt
        self._orders.append(order)

    def wait(self, timeout_s: float) -> Sequence[tuple[Order, Outcome]]:
        order = self._orders.pop()
        settings = json.loads(order.line())["settings"]  # as a worker gets them
        outcome = run_cell(order.folder, settings, keep_models=order.keep_models)
        self.done.append(order.folder)
        return [(order, outcome)]

    def interrupt(self) -> Iterator[tuple[Order, Outcome]]:
        return iter(())

    def close(self) -> None:
        return None


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a small text" for number in range(4000)))
    base = {"preset": "recommended", "arch": "phi", "trigger": "never", "n_layer": 2, "max_layers": 2}
    shape = {"n_head": 2, "n_embd": 16, "context_length": 32, "batch_size": 4, "vocab_size": 300}
    where = {"dataset_path": str(text), "cache_dir": str(tmp_path / "cache"), "device": "cpu"}
    return study(
        baseline="adapters",
        seeds=2,
        budget={"steps": 6},
        base={**base, **shape, **where, "dropout": 0.0, "lr": 0.01},
        pretrain={"max_steps": 30, "eval_interval_steps": 15},
        retrofit={"layers": [0], "platters": 2, "period": 16, "train_size": 40},
        keep_models=True,
        conditions={
            "adapters": {"retrofit": {"variant": "adapters"}},
            "untouched": {"retrofit": {"variant": "untouched"}},
            "torus": {},
            "four": {"retrofit": {"platters": 4}},
            "swap": {"retrofit": {"variant": "random_swap", "layers": None}},
            "identity": {"retrofit": {"variant": "identity", "platters": 4, "layers": None}},
            "suggested": {"retrofit": {"suggest_layers": 1, "layers": None}},
        },
    )


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and its figures take seconds."""
    monkeypatch.setattr("aiether.study.runner.write_study_report", lambda folder: folder / "results.json")


def test_a_study_trains_one_model_and_goes_on_where_it_stopped(
    content: dict[str, Any], tmp_path: Path
) -> None:
    folder, spec = tmp_path / "study", spec_from(content)
    first = run_study(spec, folder, Silent(), backend=lambda threads: InTurn(stop_before=4))
    assert first.status == "interrupted"
    workers = InTurn()
    result = run_study(spec, folder, Silent(), backend=lambda threads: workers)
    assert (result.status, result.failures) == ("finished", {})
    assert len(workers.done) == 14 - 3, "the base model and three runs were there"
    found = json.loads((folder / "results.json").read_text())
    losses = {entry["condition"]: [row["metric"] for row in entry["cells"]] for entry in found["arms"]}
    assert found["arms"][3]["settings"] == {"platters": 4}
    assert len(set(losses["untouched"])) == 1, "seeds change nothing where nothing is done"
    assert losses["identity"] == losses["untouched"], "a conversion that stands at 0 is none"
    for name in ("adapters", "torus", "four", "swap"):
        assert len(set(losses[name])) == 2
    cell = folder / "cells/torus/1-seed0"
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert rows[0]["eval_loss"] == pytest.approx(losses["untouched"][0], abs=1e-6), "it begins as it was"
    told, swap, suggested = (
        json.loads((folder / "cells" / name / "1-seed0/retrofit.json").read_text())
        for name in ("torus", "swap", "suggested")
    )
    assert (told["layers"], swap["layers"]) == ([0], [0, 1])
    assert len(suggested["layers"]) == 1
    assert swap["trained_parameters"] > 2 * 4 * 16 * 16 > told["trained_parameters"]
    assert told["terms"][0].startswith("layer 0: gate 0.50, lambda")
    assert (folder / "base" / "final" / "model.safetensors").is_file()
    ids = torch.arange(20, 52)[None]
    base = AutoModelForCausalLM.from_pretrained(folder / "base/final").eval()
    kept = aiether.load(folder / "cells/torus/1-seed0/final").eval()
    with torch.no_grad():
        kept, base = kept(input_ids=ids).logits, base(input_ids=ids).logits
    assert not torch.equal(kept, base)
    assert not (folder / "cells/untouched/1-seed0/final").exists(), "that is the model in base"
    assert (folder / "cells/torus/1-seed0/final/toroidal.safetensors").is_file()
    write_study_report(folder)
    assert check(folder)["tables"] > 100, "as the raw records have it, arms that train nothing among them"


def test_without_keeping_models_a_run_leaves_its_records_alone(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_from(content)
    base = asdict(pretrain_config(spec)) | {"max_steps": 2}
    assert run_cell(tmp_path / "base", base, keep_models=True).status == "finished"
    often = lambda *given: replace(tuning_of(*given), save_interval=2)  # noqa: E731
    monkeypatch.setattr("aiether.retrofitting.arm.tuning_of", often)
    settings = asdict(cell_config(spec, Cell("torus", 1.0, 0))) | {"retrofit": retrofit_of(spec, "torus")}
    settings |= {"retrofit_base": str(tmp_path / "base" / "final")}
    assert run_cell(tmp_path / "torus", settings, keep_models=False).status == "finished"
    assert not [each.name for each in (tmp_path / "torus").iterdir() if each.is_dir()]
    assert (tmp_path / "torus" / "retrofit.json").is_file()


def test_the_pairs_of_platters_count_among_the_flops(content: dict[str, Any]) -> None:
    spec = spec_from(content)
    config = check_spec(spec)["torus"]
    plain_attention = 3 * 4 * config.context_length * config.n_embd
    added = {
        name: arm_settings(retrofit_of(spec, name) or {}).flops_per_token(config) / plain_attention
        for name in spec.all_conditions()
    }
    assert added == {
        "adapters": 0,
        "untouched": 0,
        "identity": 0,
        "torus": 2**2 - 1,
        "four": 4**2 - 1,
        "swap": 2 * (2**2 - 1),
        "suggested": 2**2 - 1,
    }


def test_the_first_models_training_is_seen_from_its_records(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(InTurn):
        """Trains ten steps whenever somebody waits."""

        steps = 0

        def wait(self, timeout_s: float) -> Sequence[tuple[Order, Outcome]]:
            (order,) = self._orders
            if self.steps == 30:
                return [(order, Outcome("finished"))]
            self.steps += 10
            order.folder.mkdir(exist_ok=True)
            (order.folder / "lineage.json").write_text('{"steps": 30}')
            with (order.folder / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {self.steps}}}\n')
            return []

    class Watching(Silent):
        seen: list[tuple[str, float]] = []  # noqa: RUF012 - one object

        def preparing(self, phase: str, fraction: float) -> None:
            self.seen.append((phase, fraction))

    monkeypatch.setattr("aiether.study.pretraining._LOOK_S", 0.0)
    pretrain(spec_from(content), tmp_path, Slow(), Watching())
    (phase,) = {phase for phase, _ in Watching.seen}
    assert "the model that the study begins with" in phase
    assert [share for _, share in Watching.seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_specification_comes_back_and_conditions_override(content: dict[str, Any]) -> None:
    spec = spec_from(content)
    assert spec_from(plain(spec)) == spec
    assert retrofit_of(spec, "four") == {"layers": [0], "platters": 4, "period": 16, "train_size": 40}
    assert retrofit_of(spec_from(study()), "grown") is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pretrain": None}, "belong together"),
        ({"budget": {"tokens": 5000}}, "has one in steps"),
        ({"retrofit": {"layers": [2]}}, r"layers is \[2\]: from 0 to 1"),
        ({"retrofit": {"layers": [0], "suggest_layers": 1}}, "give one of the two"),
        ({"retrofit": {"suggest_layers": 3}}, "choose from 1 to 2"),
        ({"retrofit": {"platters": 3}}, "does not divide"),
        ({"retrofit": {"lamda": 3}}, "no setting 'lamda'"),
        ({"retrofit": {"steps": 3}}, "no setting 'steps'"),
        ({"retrofit": {"variant": "all"}}, "adapters, untouched, identity, random_swap"),
        ({"pretrain": {"n_embd": 32, "max_steps": 5}}, "n_embd is not the pretrained model's"),
        ({"pretrain": {"max_steps": 5, "n_heads": 2}}, "pretrain: unknown"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    content: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check_spec(spec_from({**content, **change}))


def test_shuffled_places_are_another_torus() -> None:
    from aiether.toroidal.distance import shuffled_places

    places = torch.arange(64)
    moved = shuffled_places(places, 16, sinks=4)
    assert torch.equal(moved[:4], places[:4])
    assert (moved[4:] >= 16).all()
    assert torch.equal(moved[16:32].remainder(16), moved[32:48].remainder(16)), "it comes round"
    assert sorted(moved[16:32].remainder(16).tolist()) == list(range(16))
    assert not torch.equal(moved[16:32].remainder(16), places[:16])
