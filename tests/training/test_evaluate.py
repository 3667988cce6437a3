from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.corpus import write_corpus
from tests.training.tiny_run import TINY_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from aiether.data import TokenWindows, prepare
from aiether.training.config import read_config, resolve, write_config
from aiether.training.evaluate import conformance, evaluate
from aiether.training.run import train

CONTEXT = 16
WINDOWS = 12


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, without_report: None) -> Path:
    """A finished run; its own evaluations are over twelve windows of the validation split."""
    root = tmp_path_factory.mktemp("evaluate")
    settings: dict[str, Any] = {
        **TINY_RUN,
        "dataset_path": str(write_corpus(root / "train.txt")),
        "cache_dir": str(root / "cache"),
        "output_dir": str(root / "run"),
        "max_steps": 20,
        "eval_interval_steps": 10,
        "batch_size": 4,
        "eval_batches": WINDOWS // 4,
        "lr": 0.02,
    }
    train(resolve("recommended", {}, settings))
    write_corpus(root / "valid.txt", documents=6, seed=1)
    return root / "run"


@pytest.fixture
def valid(run_dir: Path) -> dict[str, Any]:
    return {"dataset_path": str(run_dir.parent / "valid.txt"), "cache_dir": str(run_dir.parent / "cache")}


def joined(run_dir: Path) -> tuple[list[int], int]:
    """The validation text in tokens, each document up to its marker, and its bytes; by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    documents = (run_dir.parent / "valid.txt").read_text().split("<|endoftext|>\n")
    ids = [id for text in documents for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return ids, sum(len(text.encode()) for text in documents)


Nll = Callable[[list[int]], list[float]]


@pytest.fixture(scope="module")
def nll(run_dir: Path) -> Nll:
    """By hand: of each token but the first, minus its log-probability after those before it."""
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final").eval()

    def losses(ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        return [float(-logits[i].double().log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1)]

    return losses


def test_on_its_own_windows_a_run_has_its_own_loss(run_dir: Path) -> None:
    found = evaluate(run_dir, windows=WINDOWS, batch_size=5)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert found.loss == pytest.approx(last["eval_loss"], abs=2e-6)
    assert found.bits_per_byte == pytest.approx(last["bits_per_byte"], abs=2e-6)
    assert (found.windows, found.tokens, found.context_length) == (WINDOWS, WINDOWS * (CONTEXT - 1), CONTEXT)
    assert found.source.startswith("validation split of ")
    assert evaluate(run_dir / "final", windows=WINDOWS).loss == pytest.approx(found.loss, abs=1e-6)


def test_on_a_text_the_loss_is_that_of_a_computation_by_hand(
    run_dir: Path, valid: dict[str, Any], nll: Nll
) -> None:
    ids, nbytes = joined(run_dir)
    starts = range(0, len(ids) - CONTEXT + 1, CONTEXT)
    losses = [nll(ids[start : start + CONTEXT]) for start in starts]
    expected = sum(map(sum, losses)) / sum(map(len, losses))
    found = evaluate(run_dir, **valid, batch_size=7)
    assert found.loss == pytest.approx(expected, abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected * len(ids) / nbytes / math.log(2), abs=1e-5)
    assert found.tokens == len(starts) * (CONTEXT - 1)
    by_place = [sum(places) / len(places) for places in zip(*losses, strict=True)]
    assert [each.loss for each in found.buckets] == pytest.approx(
        [by_place[0], sum(by_place[1:3]) / 2, sum(by_place[3:7]) / 4, sum(by_place[7:]) / 8], abs=1e-6
    )


def test_with_a_stride_every_token_counts_once_with_more_before_it(
    run_dir: Path, valid: dict[str, Any], nll: Nll
) -> None:
    ids, _ = joined(run_dir)
    stride, losses = 6, nll(ids[:CONTEXT])
    while len(losses) < len(ids) - 1:
        stop = min(len(losses) + 1 + stride, len(ids))
        new = stop - len(losses) - 1
        losses += nll(ids[stop - CONTEXT : stop])[-new:]
    found = evaluate(run_dir, **valid, stride=stride)
    assert found.tokens == len(ids) - 1
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_what_it_costs_is_told(run_dir: Path, valid: dict[str, Any]) -> None:
    short = evaluate(run_dir, **valid, windows=3, context_length=8)
    found = evaluate(run_dir, **valid, windows=3)
    config = AutoModelForCausalLM.from_pretrained(run_dir / "final").config
    layers, width = config.n_layer, config.n_embd
    head = 2 * width * config.vocab_size
    assert found.forward_flops_per_token == layers * (24 * width**2 + 4 * CONTEXT * width) + head
    assert found.forward_flops_per_token - short.forward_flops_per_token == layers * 4 * 8 * width
    assert found.tokens_per_s > 0
    shown = str(found)
    for part in (f"{found.loss:.4f} nats", "bits per byte", "3 windows of 16", "8-15", "on cpu, float32"):
        assert part in shown
    assert json.loads(json.dumps(found.to_dict()))["buckets"][0]["start"] == 1


def test_a_model_with_figures_of_its_own_is_asked_for_those_of_the_evaluation_alone(
    run_dir: Path, valid: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = GPT2LMHeadModel.forward

    def counting(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counting)
    monkeypatch.setattr(GPT2LMHeadModel, "reset_compute_figures", lambda self: seen.clear(), raising=False)
    monkeypatch.setattr(
        GPT2LMHeadModel,
        "compute_figures",
        lambda self: {"mean iterations": torch.tensor(sum(seen))},
        raising=False,
    )
    found = evaluate(run_dir, **valid, windows=3)
    assert found.extra == {"mean iterations": 3.0 * CONTEXT}
    assert "mean iterations  48" in str(found)
    monkeypatch.undo()
    assert evaluate(run_dir, **valid, windows=3).extra == {}


def test_a_run_beside_its_own_checkpoint(run_dir: Path) -> None:
    """On the run's own split, the tokenizer of one in its folder, of the other with the run's data."""
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime)
    found = evaluate(run_dir, windows=3, against=str(newest), parity_tokens=5)
    assert found.against is not None
    assert found.against.loss == pytest.approx(found.loss, abs=1e-6)
    assert (found.against.kl, found.against.loss_difference) == (0.0, 0.0)
    assert found.against.bits_per_byte == pytest.approx(found.bits_per_byte, abs=1e-6)
    assert found.decode_parity is not None
    assert found.decode_parity.tokens == 5


def test_bfloat16_is_close(run_dir: Path, valid: dict[str, Any]) -> None:
    exact, rounded = evaluate(run_dir, **valid), evaluate(run_dir, **valid, bf16=True)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert rounded.dtype == "bfloat16"


def test_a_folder_that_is_no_run_needs_a_text_and_finds_its_tokenizer(
    run_dir: Path, tmp_path: Path, valid: dict[str, Any]
) -> None:
    shutil.copytree(run_dir / "final", tmp_path / "a" / "b" / "c" / "model")
    model = tmp_path / "a" / "b" / "c" / "model"
    with pytest.raises(ValueError, match=r"belongs to no run.*--dataset_path"):
        evaluate(model)
    expected = evaluate(run_dir, **valid).loss
    assert evaluate(model, **valid).loss == expected
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(ValueError, match="--tokenizer"):
        evaluate(model, **valid)
    assert evaluate(model, **valid, tokenizer=str(run_dir / "final")).loss == expected


def test_a_checkpoint_of_a_run_has_the_tokenizer_of_its_data(run_dir: Path, valid: dict[str, Any]) -> None:
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime)
    assert not (newest / "tokenizer.json").exists()
    assert evaluate(newest, **valid).loss == pytest.approx(evaluate(run_dir, **valid).loss, abs=1e-6)


def test_a_run_whose_data_has_changed_has_no_split_any_more(run_dir: Path) -> None:
    text = run_dir.parent / "train.txt"
    before = text.read_text()
    try:
        write_corpus(text, seed=9)
        with pytest.raises(ValueError, match="has changed since the run started"):
            evaluate(run_dir)
    finally:
        text.write_text(before)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"context_length": 17}, "context_length is 17; the model takes at most 16"),
        ({"stride": 16}, "stride is 16; allowed is 1 to 15"),
        ({"windows": 0}, "windows is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "mps"}, "device 'mps' is not available"),
        ({"context_length": 0}, "context_length is 0"),
        ({"tokenizer": "x"}, "give dataset_path too"),
        ({"token_dtype": "uint32"}, "give dataset_path too"),
        ({"dataset_path": "none.txt"}, "does not exist"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(run_dir: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        evaluate(run_dir, **settings)


def test_the_split_of_a_mixture_is_evaluated_side_by_side_alone(run_dir: Path, tmp_path: Path) -> None:
    paths = (
        str(run_dir.parent / "train.txt"),
        str(write_corpus(tmp_path / "more.txt", documents=60, seed=4)),
    )
    config = replace(
        read_config(run_dir / "config.yaml"),
        dataset_path=paths,
        dataset_weights=(0.25, 0.75),
        output_dir=None,
    )
    data = prepare(config)
    shutil.copytree(run_dir / "final", tmp_path / "run" / "final")
    write_config(tmp_path / "run" / "config.yaml", config)
    (tmp_path / "run" / "environment.json").write_text(
        json.dumps({"data": {"fingerprint": data.fingerprint}})
    )
    found = evaluate(tmp_path / "run", windows=8)
    windows = TokenWindows(data.validation, CONTEXT, seed=None, num_windows=8)
    assert {windows.locate(index)[0] for index in range(8)} == {0, 1}
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final").eval()
    ids = torch.stack([windows[index]["input_ids"] for index in range(8)])
    with torch.no_grad():
        assert found.loss == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-6)
    with pytest.raises(ValueError, match="stride is for one text"):
        evaluate(tmp_path / "run", stride=4)


def test_too_little_memory_is_told_with_what_to_change(
    run_dir: Path, valid: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GPT2LMHeadModel.forward

    def small(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", small)
    with pytest.raises(ValueError, match=r"too little memory for 5 windows.*smaller batch_size"):
        evaluate(run_dir, **valid, batch_size=5)
    assert evaluate(run_dir, **valid, batch_size=2).tokens > 0


def test_a_tokenizer_that_is_not_the_models_is_refused(
    run_dir: Path, tmp_path: Path, valid: dict[str, Any]
) -> None:
    shutil.copytree(run_dir / "final", tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="the model's vocabulary 100 entries"):
        evaluate(tmp_path / "small", **valid)


def test_a_runs_model_conforms(run_dir: Path) -> None:
    report = conformance(run_dir, length=12, device="cpu")
    assert report.passed, str(report)
    assert report.length == 12
