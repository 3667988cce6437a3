"""Studies of retrofitted models: one model is trained, each run converts and tunes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.study.fakes import Silent
from tests.study.recompute import check
from tests.study.test_spec import study
from transformers import AutoModelForCausalLM

import aiether
from aiether.data import TokenWindows, prepare
from aiether.retrofitting.arm import _batches
from aiether.retrofitting.arm_settings import arm_settings, tuning_of
from aiether.retrofitting.arm_text import text_of
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
    told, swap, suggested, adapters = (
        json.loads((folder / "cells" / name / "1-seed0/retrofit.json").read_text())
        for name in ("torus", "swap", "suggested", "adapters")
    )
    assert (told["layers"], swap["layers"]) == ([0], [0, 1])
    assert len(suggested["layers"]) == 1
    assert swap["trained_parameters"] > 2 * 4 * 16 * 16 > told["trained_parameters"]
    assert told["terms"][0].startswith("layer 0: gate 0.50, lambda")
    assert adapters["terms"] == ["layer 0: one platter, lambda 0.00 to 0.00"], "no gate, and so no torus"
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


@pytest.fixture
def own_text(content: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("\n".join(f"{number} times another sentence" for number in range(3000)))
    content["conditions"] = {
        "adapters": {"retrofit": {"variant": "adapters"}},
        "torus": {},
        "own": {"retrofit": {"dataset_path": str(path)}},
    }
    return path


def test_windows_come_from_the_own_text_in_the_studys_tokens(content: dict[str, Any], own_text: Path) -> None:
    config = check_spec(spec_from(content))["own"]
    data = prepare(config)
    arm = arm_settings({**content["retrofit"], "dataset_path": str(own_text)})
    own = text_of(arm, config, data)
    assert data.tokenizer_dir is not None
    assert own.tokenizer_dir is not None
    assert [(each / "tokenizer.json").read_text() for each in (own.tokenizer_dir, data.tokenizer_dir)] == [
        (data.tokenizer_dir / "tokenizer.json").read_text()
    ] * 2
    windows = TokenWindows(own.train, config.context_length, config.seed)
    first = {tuple(windows[index]["input_ids"].tolist()) for index in range(40)}
    batches = _batches(arm, config, own)
    seen = {tuple(row.tolist()) for number in range(30) for row in batches(number)}
    assert seen == first, "the first 40 windows of that text, all of them, and no others"


def test_a_study_tunes_on_it_and_is_evaluated_on_its_own(
    content: dict[str, Any],
    own_text: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "study"
    result = run_study(spec_from(content), folder, Silent(), backend=lambda threads: InTurn())
    assert (result.status, result.failures) == ("finished", {})
    found = json.loads((folder / "results.json").read_text())
    losses = {entry["condition"]: [row["metric"] for row in entry["cells"]] for entry in found["arms"]}
    assert losses["own"] != losses["torus"]
    records = {
        name: [
            json.loads(line)
            for line in (folder / f"cells/{name}/1-seed0/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("own", "torus")
    }
    assert records["own"][0]["eval_loss"] == records["torus"][0]["eval_loss"], "one held-out text for all"
    about = json.loads((folder / "cells/own/1-seed0/environment.json").read_text())
    assert about["tuned_on"]["source"] == str(own_text)
    assert found["environment"]["tuned_on"] == [about["tuned_on"]["fingerprint"]]
    assert found["study"]["shared"] == {name: content[name] for name in ("base", "pretrain", "retrofit")}
    assert "tuned_on" not in json.loads((folder / "cells/torus/1-seed0/environment.json").read_text())
    own_text.write_text(own_text.read_text() + "\nedited in place")
    with pytest.raises(ValueError, match=r"own/1-seed0' differs .* in what it is tuned on"):
        run_study(spec_from(content), folder, Silent(), backend=lambda threads: InTurn())


def test_what_cannot_be_tuned_on_is_refused_before_a_model_is_trained(
    content: dict[str, Any],
    own_text: Path,
    tmp_path: Path,
) -> None:
    def refused(named: str) -> None:
        workers = InTurn()
        with pytest.raises(ValueError, match=named):
            run_study(spec_from(content), tmp_path / "study", Silent(), backend=lambda threads: workers)
        assert not workers.done

    own = content["conditions"]["own"]["retrofit"]
    own["train_size"] = 10**6
    refused("condition own: train_size is 1000000, and the text holds")
    del own["train_size"]
    own["dataset_path"] = str(tmp_path / "nowhere.txt")
    refused("condition own: .*nowhere.txt")
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for name in ("train", "val"):
        np.full(4000, 5000, dtype=np.uint16).tofile(tokens / f"{name}.bin")
    own["dataset_path"] = str(tokens)
    refused("condition own: .*token id 5000")
    for name in ("train", "val"):
        (np.arange(9000) % 290).astype(np.uint16).tofile(tokens / f"{name}.bin")
    content["base"] |= {"dataset_path": str(tokens)}
    own["dataset_path"] = str(own_text)
    refused("condition own: .* a text, and the study's tokens come without a tokenizer")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "val"):
        (np.arange(9000) % 300).astype(np.uint16).tofile(other / f"{name}.bin")
    own["dataset_path"] = str(other)
    refused("condition own: .* go up to 299, and the study's model has 290 of them")
