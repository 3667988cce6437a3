"""A text sample per stage: at each growth and at the end, in the way of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.corpus import write_corpus
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from aiether.data import prepare
from aiether.training import arms
from aiether.training import run as job
from aiether.training.config import TrainConfig, resolve
from aiether.training.generate import generate
from aiether.training.recorder import Recorder
from aiether.training.samples import Sampler

STEPS = 12
SETTINGS: dict[str, Any] = {
    "n_layer": 1,
    "max_layers": 4,
    "n_head": 2,
    "n_embd": 16,
    "context_length": 16,
    "vocab_size": 300,
    "validation_fraction": 0.1,
    "dropout": 0.1,
    "max_steps": STEPS,
    "batch_size": 4,
    "lr_warmup_steps": 2,
    "trigger": "fixed",
    "growth_fractions": [0.3, 0.6],
    "eval_interval_steps": 4,
    "eval_batches": 2,
    "save_interval_steps": 3,
    "log_interval_steps": 1,
    "baseline": "static",
    "sample_prompt": "ab",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"dataset_path": str(write_corpus(folder / "words.txt")), "cache_dir": str(folder / "cache")}


def settings(data: dict[str, str], run_dir: Path, **more: Any) -> TrainConfig:
    return resolve("recommended", {}, SETTINGS | data | {"output_dir": str(run_dir)} | more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("samples") / "run"
    assert job.train(settings(data, run_dir)).status == "finished"
    return run_dir


def test_each_stage_ends_with_a_sample_and_the_baseline_has_one_too(finished: Path) -> None:
    grown_at = [event["step"] for event in rows(finished / "events.jsonl") if event["event"] == "growth"]
    written = rows(finished / "samples.jsonl")
    expected = [*zip(grown_at, (1, 2), strict=True), (STEPS, 4)]
    assert [(row["step"], row["depth"]) for row in written] == expected
    (static,) = rows(finished / "baseline-static" / "samples.jsonl")
    assert static["depth"] == 4
    for row in (*written, static):
        assert row["prompt"] == "ab"
        assert row["text"].startswith("ab")
        assert len(row["text"]) > 20


def test_a_sample_is_what_generate_says_of_the_saved_model(finished: Path) -> None:
    for arm in (finished, finished / "baseline-static"):
        last = rows(arm / "samples.jsonl")[-1]
        assert last["text"] == generate(arm / "final", "ab", max_new_tokens=20, seed=0)


def test_sampling_changes_no_bit_of_the_training(
    finished: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "sampler", lambda config, data: None)
    silent = tmp_path / "run"
    job.train(settings(data, silent, baseline="none"))
    assert not (silent / "samples.jsonl").read_text()
    weights = [load_file(run / "final" / "model.safetensors") for run in (finished, silent)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [
        [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows(run / "metrics.jsonl")]
        for run in (finished, silent)
    ]
    assert logs[0] == logs[1]


def test_the_model_is_left_as_it_was(data: dict[str, str], tmp_path: Path) -> None:
    tokenizer_dir = prepare(settings(data, tmp_path)).tokenizer_dir
    assert tokenizer_dir is not None
    size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model.config.use_cache = False
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sampler = Sampler(tokenizer_dir, "ab", seed=1)
    text = sampler.sample(model)
    assert sampler.sample(model) == text
    assert Sampler(tokenizer_dir, "ab", seed=2).sample(model) != text
    assert Sampler(tokenizer_dir, "", seed=1).sample(model), "an empty prompt starts like a document"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is False


def test_sampling_adds_no_graph_to_a_compiled_model(data: dict[str, str], tmp_path: Path) -> None:
    tokenizer_dir = prepare(settings(data, tmp_path)).tokenizer_dir
    assert tokenizer_dir is not None
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    sampler = Sampler(tokenizer_dir, "ab", seed=1)
    eager = sampler.sample(model)
    torch._dynamo.reset()
    for block in model.transformer.h:
        block.compile(backend="eager")
    ids = torch.zeros(2, 16, dtype=torch.long)
    counters.clear()
    model(ids, use_cache=False)
    graphs = dict(counters["stats"])
    assert graphs["unique_graphs"] >= 1
    assert sampler.sample(model) == eager
    model(ids, use_cache=False)
    assert dict(counters["stats"]) == graphs


def test_a_run_cut_off_after_its_sample_does_not_write_it_twice(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    """Before its checkpoint (growth), and after it (end): what was written belongs to the checkpoint."""
    original = Recorder.on_stage_end

    def cut_off(self: Recorder, **event: Any) -> None:
        original(self, **event)
        if event["grows"]:
            raise KeyError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_stage_end", cut_off)
        with pytest.raises(KeyError):
            job.train(settings(data, tmp_path / "run"))
    assert len(rows(tmp_path / "run" / "samples.jsonl")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(arms, "export", lambda *arguments: exec("raise KeyError('cut off')"))
        with pytest.raises(KeyError):
            job.resume(tmp_path / "run")
    assert len(rows(tmp_path / "run" / "samples.jsonl")) == 3
    job.resume(tmp_path / "run")
    for arm in (".", job.BASELINE):
        assert (tmp_path / "run" / arm / "samples.jsonl").read_text() == (
            finished / arm / "samples.jsonl"
        ).read_text()
