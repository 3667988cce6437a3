"""The main job end to end: a text goes in, and a grown model, its records and its report come out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.corpus import write_corpus
from transformers import AutoConfig, AutoModelForCausalLM

from aiether.cli import main
from aiether.data import prepare
from aiether.evaluation import flops_per_token
from aiether.training import run as job
from aiether.training.config import TrainConfig, read_config, resolve
from aiether.training.layer_states import LayerStateManager

CONTEXT, BATCH, STEPS = 16, 4, 40
GROWING: dict[str, Any] = {
    "n_layer": 1,
    "max_layers": 4,
    "n_head": 2,
    "n_embd": 16,
    "context_length": CONTEXT,
    "vocab_size": 300,
    "validation_fraction": 0.1,
    "dropout": 0.1,
    "max_steps": STEPS,
    "batch_size": BATCH,
    "lr_warmup_steps": 4,
    "trigger": "geometric",
    "tau_crit": 1e-6,
    "kappa_crit": 1e-6,
    "pg_patience": 1,
    "pg_threshold": 10.0,
    "warmup_steps": 4,
    "history_window_size": 5,
    "collect_interval_steps": 2,
    "eval_interval_steps": 4,
    "eval_batches": 2,
    "log_interval_steps": 5,
    "baseline": "static",
    "device": "cpu",
}
STATIC = GROWING | {"trigger": "never", "n_layer": 2, "max_layers": 2, "baseline": "none", "max_steps": 8}
RUNS = (("gpt2", "adamw"), ("llama", "muon"))
ARMS = [(arch, optimizer, arm) for arch, optimizer in RUNS for arm in (".", job.BASELINE)]


@dataclass(frozen=True)
class Run:
    """A finished run and what it was told."""

    run_dir: Path
    settings: dict[str, Any]

    def json(self, *path: str) -> Any:
        return json.loads(Path(self.run_dir, *path).read_text())

    def rows(self, *path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.run_dir, *path).read_text().splitlines()]

    def kind(self, kind: str, arm: str = ".") -> list[dict[str, Any]]:
        return [row for row in self.rows(arm, "metrics.jsonl") if row["kind"] == kind]


Finished = Callable[[str, str], Run]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"dataset_path": str(write_corpus(folder / "words.txt")), "cache_dir": str(folder / "cache")}


@pytest.fixture(scope="module")
def finished(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A growing run and its baseline through the command line, once for each architecture and optimizer."""
    done: dict[tuple[str, str], Run] = {}

    def run(arch: str, optimizer: str) -> Run:
        if (arch, optimizer) not in done:
            run_dir = tmp_path_factory.mktemp("runs") / f"{arch}-{optimizer}"
            settings = GROWING | data | {"arch": arch, "optimizer": optimizer, "output_dir": str(run_dir)}
            assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0
            done[arch, optimizer] = Run(run_dir, settings)
        return done[arch, optimizer]

    return run


@pytest.fixture
def config(data: dict[str, str], tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**settings: Any) -> TrainConfig:
        return resolve("recommended", {}, STATIC | data | {"output_dir": str(tmp_path / "run")} | settings)

    return make


def depth_at(step: int, growths: list[dict[str, Any]]) -> int:
    """Layers that optimizer step number `step` (from 1) trained."""
    depth = growths[0]["depth_before"]
    for growth in growths:
        depth = growth["depth_after"] if step > growth["step"] else depth
    return depth


@pytest.mark.parametrize(("arch", "optimizer", "arm"), ARMS)
def test_the_run_folder_is_complete(finished: Finished, arch: str, optimizer: str, arm: str) -> None:
    run = finished(arch, optimizer)
    files = {"metrics.jsonl", "events.jsonl", "lineage.json", "result.json", "final", "layers", "checkpoints"}
    if arm == ".":
        files |= {"config.yaml", "environment.json", "report.html", "samples.jsonl", "summary.json"}
    assert files <= {path.name for path in (run.run_dir / arm).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in (run.run_dir / arm / "final").iterdir()
    }
    assert not list(run.run_dir.rglob(".*")), "something was begun and not finished"


@pytest.mark.parametrize(("arch", "optimizer", "arm"), ARMS)
def test_metrics_have_their_fields_and_rhythm(
    finished: Finished, arch: str, optimizer: str, arm: str
) -> None:
    run = finished(arch, optimizer)
    train, evaluations = run.kind("train", arm), run.kind("eval", arm)
    budget = {"kind", "step", "stage", "depth", "tokens", "flops", "elapsed_s"}
    rates = {"loss", "grad_norm", "learning_rate", "steps_per_s", "tokens_per_s"}
    geometry = {"tau", "kappa", "tau_normalised", "kappa_normalised", "rho", "rho_straight"}
    assert all(row.keys() >= budget | rates and None not in row.values() for row in train)
    assert all(row.keys() >= budget | geometry | {"eval_loss", "bits_per_byte"} for row in evaluations)
    steps = run.json(arm, "result.json")["steps"]
    assert [row["step"] for row in train] == list(range(5, steps + 1, 5))
    assert [row["step"] for row in evaluations] == sorted({*range(4, steps + 1, 4), steps})
    for row in evaluations:
        assert {row[name] is not None for name in geometry} == {row["num_snapshots"] >= 3}
        assert row["bits_per_byte"] > 0
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


@pytest.mark.parametrize(("arch", "optimizer"), RUNS)
def test_the_trigger_grew_the_model_twice(finished: Finished, arch: str, optimizer: str) -> None:
    run = finished(arch, optimizer)
    growths, lineage = run.rows("events.jsonl"), run.json("lineage.json")
    assert [(event["depth_before"], event["depth_after"]) for event in growths] == [(1, 2), (2, 4)]
    evaluations = {row["step"]: row for row in run.kind("eval")}
    for event in growths:
        decision = evaluations[event["step"]]
        assert event["loss_before"] == decision["eval_loss"]
        assert decision["tau_normalised"] >= 1e-6
        assert decision["stagnation"] >= 1
        assert math.isfinite(event["loss_after"])
        assert event["tensors"]
        assert event["plan"]["depth_after"] == event["depth_after"]
        assert "tau" in event["reason"]
    born = sorted(record["born_step"] for record in lineage["records"])
    assert born == [0, growths[0]["step"], growths[1]["step"], growths[1]["step"]]
    assert lineage["steps"] == STEPS


@pytest.mark.parametrize(("arch", "optimizer"), RUNS)
def test_layers_are_kept_as_born_and_as_they_were_at_the_last_growth(
    finished: Finished, arch: str, optimizer: str
) -> None:
    run = finished(arch, optimizer)
    last_growth = run.rows("events.jsonl")[-1]["step"]
    states = LayerStateManager(run.run_dir / "layers")
    final = load_file(run.run_dir / "final" / "model.safetensors")
    blocks = "transformer.h" if arch == "gpt2" else "model.layers"
    for position, record in enumerate(run.json("lineage.json")["records"]):
        born, metadata = states.load_state(record["id"], "L0")
        assert metadata["step"] == record["born_step"]
        now = {name: final[f"{blocks}.{position}.{name}"] for name in born}
        moved = [name for name in born if not torch.equal(born[name], now[name])]
        assert moved == list(born), "every tensor of every layer trains after its birth"
        if record["born_step"] < last_growth:
            assert states.load_state(record["id"], "L1")[1]["step"] == last_growth
    assert len(states.list_states()) == 4 + 2


@pytest.mark.parametrize(("arch", "optimizer", "arm"), ARMS)
def test_tokens_and_flops_add_up(finished: Finished, arch: str, optimizer: str, arm: str) -> None:
    run = finished(arch, optimizer)
    result = run.json(arm, "result.json")
    growths = run.rows(arm, "events.jsonl") or [{"depth_before": result["depth"], "step": result["steps"]}]
    model = AutoConfig.from_pretrained(run.run_dir / arm / "final")
    flops, spent = 0, {0: 0}
    for step in range(1, result["steps"] + 1):
        model.num_hidden_layers = depth_at(step, growths)
        flops += flops_per_token(model, CONTEXT) * BATCH * CONTEXT
        spent[step] = flops
    assert (result["flops"], result["tokens"]) == (flops, result["steps"] * BATCH * CONTEXT)
    for row in run.rows(arm, "metrics.jsonl"):
        assert (row["flops"], row["tokens"]) == (spent[row["step"]], row["step"] * BATCH * CONTEXT)


@pytest.mark.parametrize(("arch", "optimizer"), RUNS)
def test_the_baseline_is_the_final_depth_for_the_same_flops(
    finished: Finished, arch: str, optimizer: str
) -> None:
    summary = finished(arch, optimizer).json("summary.json")
    (baseline,) = summary["baselines"]
    assert summary["status"] == baseline["status"] == "finished"
    assert (summary["steps"], summary["growths"]) == (STEPS, 2)
    assert (baseline["depth"], baseline["growths"]) == (summary["depth"], 0) == (4, 0)
    assert abs(baseline["flops"] - summary["flops"]) < baseline["flops"] / baseline["steps"]


@pytest.mark.parametrize(("arch", "optimizer"), RUNS)
def test_settings_environment_and_report_are_on_record(finished: Finished, arch: str, optimizer: str) -> None:
    run = finished(arch, optimizer)
    assert read_config(run.run_dir / "config.yaml") == resolve(None, {}, run.settings)
    environment = run.json("environment.json")
    assert environment["torch"] == torch.__version__
    assert environment["data"]["documents"] == 150
    assert "<svg" in (run.run_dir / "report.html").read_text()


WITHOUT_AIETHER = """
import sys
sys.modules["aiether"] = None  # any import of it now fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for folder, inputs, outputs in zip(*[iter(sys.argv[1:])] * 3):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("some words")["input_ids"]
    with torch.no_grad():
        save_file({"logits": model(load_file(inputs)["ids"]).logits}, outputs)
"""


def test_the_final_model_is_an_ordinary_one(finished: Finished, tmp_path: Path) -> None:
    arguments: list[str] = []
    expected: dict[str, torch.Tensor] = {}
    ids = torch.randint(256, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids")
    for arch, optimizer in RUNS:
        run_dir = finished(arch, optimizer).run_dir
        (trained,) = run_dir.glob(f"checkpoints/step-{STEPS:08d}-*")
        with torch.no_grad():
            expected[arch] = AutoModelForCausalLM.from_pretrained(trained)(ids).logits
        arguments += [str(run_dir / "final"), str(tmp_path / "ids"), str(tmp_path / arch)]
    command = [sys.executable, "-c", WITHOUT_AIETHER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for arch, logits in expected.items():
        assert torch.equal(load_file(tmp_path / arch)["logits"], logits)


def test_epochs_over_a_saved_dataset_give_the_steps(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    texts = [f"document {i}: " + " ".join(str(i * j) for j in range(40)) for i in range(60)]
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "saved")
    settings = config(
        dataset_path=str(tmp_path / "saved"),
        text_column="body",
        max_steps=None,
        num_epochs=0.1,
        gradient_accumulation_steps=3,
    )
    windows = len(prepare(settings).train) // CONTEXT
    result = job.train(settings)
    assert result.grown.steps == math.ceil(0.1 * windows / (BATCH * 3)) > 1
    assert result.grown.tokens == result.grown.steps * BATCH * 3 * CONTEXT
    environment = json.loads((result.run_dir / "environment.json").read_text())
    assert environment["data"]["documents"] == len(texts)


def test_accumulated_batches_train_like_one_large_batch(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    whole, parts = (
        job.train(config(dropout=0.0, output_dir=str(tmp_path / name), **settings))
        for name, settings in {
            "whole": {"batch_size": 4},
            "parts": {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_batches": 4},
        }.items()
    )
    assert (whole.grown.tokens, whole.grown.flops) == (parts.grown.tokens, parts.grown.flops)
    tensors = [load_file(result.run_dir / "final" / "model.safetensors") for result in (whole, parts)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=1e-3)  # of moves of up to 1e-2
    rows = [Run(result.run_dir, {}).kind("train") for result in (whole, parts)]
    for one, other in zip(*rows, strict=True):  # the optimizers would hide a gradient of another scale
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_folder_that_holds_a_run_is_refused(finished: Finished) -> None:
    run = finished("gpt2", "adamw")
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already.* --resume"):
        job.train(resolve(None, {}, run.settings))
    with pytest.raises(ValueError, match="is finished; its report is"):
        job.resume(run.run_dir)
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run \(config.yaml is missing\)"):
        job.resume(tmp_path)


def test_a_run_that_failed_in_its_report_gets_it_on_resume(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run_dir: Path) -> Path:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_report", fail)
        with pytest.raises(OSError, match="no space"):
            job.train(config())
    result = job.resume(Path(str(config().output_dir)))
    assert result.status == "finished"
    assert result.report is not None
    assert result.report.is_file()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device='{device}' is not available here"):
        job.train(config(device=device))
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used_leaves_no_run_folder(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"missing\.txt"):
        job.train(config(dataset_path=str(tmp_path / "missing.txt")))
    with pytest.raises(ValueError, match="less than one window"):
        job.train(config(context_length=10_000))
    assert not (tmp_path / "run").exists()


def test_data_that_changed_since_the_start_are_refused(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = write_corpus(tmp_path / "own.txt")
    settings = config(dataset_path=str(text))

    def fail(*arguments: Any, **settings: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_arm", fail)
        with pytest.raises(OSError, match="no space"):
            job.train(settings)
    text.write_text(text.read_text().upper())
    with pytest.raises(ValueError, match="has changed since the run started"):
        job.resume(str(settings.output_dir))


def test_cudnn_attention_is_off_during_a_run_and_only_then(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    allowed: list[bool] = []

    def stop(*arguments: Any, **settings: Any) -> None:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise OSError("no space left")

    monkeypatch.setattr(job, "run_arm", stop)
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        with pytest.raises(OSError, match="no space"):
            job.train(config(output_dir=str(tmp_path / str(before))))
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert allowed == [False, False]


def test_bf16_on_a_machine_without_accelerator_trains_on_the_cpu(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert job.train(config(device="auto", bf16=True, max_steps=4)).status == "finished"


def test_no_growth_after_the_last_step(data: dict[str, str], tmp_path: Path) -> None:
    settings = GROWING | data | {"output_dir": str(tmp_path / "run"), "baseline": "none"}
    settings |= {"max_steps": 8, "warmup_steps": 8, "latest_growth": 1.0}
    result = job.train(resolve(None, {}, settings))
    (evaluation,) = [row for row in Run(result.run_dir, {}).kind("eval") if row["step"] == 8]
    assert evaluation["stagnation"] >= 1, "the trigger must be about to grow, or this shows nothing"
    assert result.grown.depth == evaluation["depth"] == 1
