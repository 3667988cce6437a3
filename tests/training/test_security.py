"""Folders and records that somebody with bad intent wrote: nothing of them is run, followed or rendered."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.training.corpus import write_corpus
from transformers import GPT2Config, GPT2LMHeadModel

from aiether.cli import main
from aiether.data.sources import open_saved_dataset
from aiether.data.tokenizer import train_tokenizer
from aiether.integrations import CheckpointStore
from aiether.training.config import resolve, write_config
from aiether.training.report import write_report

MODULE = """
import pathlib
pathlib.Path({marker!r}).write_text("it ran")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class XConfig(GPT2Config):
    model_type = "xmodel"
class XModel(GPT2LMHeadModel):
    config_class = XConfig
class XTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "MARKER"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, as save_pretrained writes it."""
    tokenizer = train_tokenizer(["some text to learn from, some more text"] * 3, 280)
    tokenizer.save(tmp_path / "model")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=tokenizer.vocab_size)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Payload:
    """Pickled, it writes the marker when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "it ran")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def generate(folder: Path, *flags: str) -> int:
    return main(["generate", str(folder), "some", "--max_new_tokens", "2", "--device", "cpu", *flags])


def test_the_payload_is_one(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))  # noqa: S301 - the proof that it would run
    assert marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_with_advice(
    folder: Path, marker: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    assert generate(folder) == 2
    said = capsys.readouterr().err
    assert f"only {name}, which can run code" in said
    assert "save_pretrained" in said
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt"])
def test_pickles_beside_safetensors_are_not_touched(folder: Path, marker: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    assert generate(folder) == 0
    assert not marker.exists()


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "evil.bin", "..", "a\\b.safetensors"]
)
def test_an_index_leads_to_safetensors_in_its_own_folder_only(
    folder: Path, marker: Path, shard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "other").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "other" / "model.safetensors")
    (folder / "evil.bin").write_bytes(pickle.dumps(Payload(marker)))
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert generate(folder) == 2
    assert f"names the shard {shard!r}" in capsys.readouterr().err
    assert not marker.exists()


def test_a_config_names_no_other_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "config.json", transformers_weights="../x.safetensors")
    assert generate(folder) == 2
    assert "names the weights '../x.safetensors'" in capsys.readouterr().err


BOMB = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()


@pytest.mark.parametrize(
    "content", [struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", len(BOMB)) + BOMB, b"x"]
)
def test_header_bombs_are_damaged_files(
    folder: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert generate(folder) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"n_layer": 10_000_000}, "10000000 layers, the weights are"),
        ({"n_layer": 2}, "weights are missing"),
        ({"model_type": "bert"}, "weights are missing"),
        ({"vocab_size": 999}, "cannot be loaded"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(
    folder: Path, settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "config.json", **settings)
    assert generate(folder) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_a_tokenizer_of_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=100)
    ).save_pretrained(folder)
    capsys.readouterr()
    assert generate(folder) == 2
    assert "the model's vocabulary 100 entries: they do not belong together" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    capsys.readouterr()
    assert generate(folder) == 2
    assert "predictions are not finite" in capsys.readouterr().err


def test_code_of_a_model_folder_runs_only_when_trusted(
    folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    (folder / "modeling_x.py").write_text(MODULE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    edit(folder / "config.json", auto_map=auto_map, model_type="xmodel", architectures=["XModel"])
    assert generate(folder) == 2
    assert "read it, and give --trust_remote_code if you trust it" in capsys.readouterr().err
    assert not marker.exists()
    assert generate(folder, "--trust_remote_code") == 0
    assert marker.exists()


def test_code_of_a_tokenizer_folder_does_not_run(
    folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tok_x.py").write_text(MODULE.format(marker=str(marker)))
    auto_map = {"AutoTokenizer": ["tok_x.XTokenizer", "tok_x.XTokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="XTokenizer")
    assert generate(folder) == 0, "tokenizer.json is enough"
    (folder / "tokenizer.json").rename(folder.parent / "tokenizer.json")
    capsys.readouterr()
    assert generate(folder) == 2
    assert "tokenizer_config.json asks for code" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd"])
def test_a_checkpoints_marker_names_only_its_own_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoints" / "step-00000001-stage-000"
    path.mkdir(parents=True)
    (path.parent / "outside.json").write_text("{}")
    (path / "COMPLETE.json").write_text(json.dumps({"files": {name: [2, 0]}, "snapshots": {}}))
    checkpoint, skipped = CheckpointStore(tmp_path).newest()
    assert checkpoint is None
    assert skipped == {path: "COMPLETE.json names files outside of the checkpoint"}


def test_a_saved_dataset_runs_nothing_and_stays_in_its_folder(tmp_path: Path, marker: Path) -> None:
    import datasets
    import pyarrow as pa

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a b c"] * 9}).save_to_disk(saved)
    file = saved / "data-00000-of-00001.arrow"
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=extension)])
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table({"text": ["a b c"] * 9}, schema=schema))
    file.write_bytes(sink.getvalue())
    open_saved_dataset(saved, "text")
    assert not marker.exists()

    file.rename(tmp_path / file.name)
    edit(saved / "state.json", _data_files=[{"filename": f"../{file.name}"}])
    with pytest.raises(ValueError, match="outside of the folder"):
        open_saved_dataset(saved, "text")


EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></svg><svg onload=alert(1)>",
)


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(run_dir: Path, evil: str) -> Path:
    """The records of a run in which every text is `evil`."""
    growth = {"event": "growth", "step": 5, "depth_before": 1, "depth_after": 2, "reason": evil}
    growth |= {"plan": {"placement": evil, "init": evil, "layers": [{"source": 0, "is_new": False}]}}
    growth |= {"loss_before": 3.0, "loss_after": 3.1, "tensors": {evil: {"gain": 0.5, evil: evil}}}
    layers = [{"id": 0, "born_step": 0, "parent": None, "init": evil}]
    layers += [{"id": 1, "born_step": 5, "parent": 0, "init": evil}]
    budget = {"depth": 1, "tokens": 10, "flops": 10, "elapsed_s": 1.0}
    rows = [
        {"kind": k, "step": s, "loss": 3.0, "eval_loss": 3.0, **budget}
        for s in (5, 9)
        for k in ("train", "eval")
    ]
    for folder in (run_dir, run_dir / "baseline-static"):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = (growth, {"event": evil, "step": 6, "text": evil})
    (run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    (run_dir / "lineage.json").write_text(json.dumps({"records": layers}))
    (run_dir / "samples.jsonl").write_text(json.dumps({"step": 9, "prompt": evil, "text": evil}) + "\n")
    (run_dir / "summary.json").write_text(json.dumps({"status": evil, "depth": 2}))
    (run_dir / "environment.json").write_text(json.dumps({"data": {"source": evil}, evil: evil}))
    write_config(
        run_dir / "config.yaml", resolve("report", {}, {"dataset_path": evil, "sample_prompt": evil})
    )
    settings = yaml.safe_load((run_dir / "config.yaml").read_text()) | {evil: evil}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    return run_dir


def test_a_report_holds_no_element_but_its_own(tmp_path: Path) -> None:
    plain = Page(write_report(write_run(tmp_path / "plain", "harmless")).read_text(encoding="utf-8"))
    assert "script" not in plain.tags
    for number, evil in enumerate(EVIL):
        name = f"run{number} <b onclick=x>"
        page = Page(write_report(write_run(tmp_path / name, evil)).read_text(encoding="utf-8"))
        assert page.tags == plain.tags
        assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
        assert page.text.count(evil) >= 8, "it is shown as it is"


def test_a_terminal_is_not_steered_by_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "words.txt")
    assert main(["train", "--dataset_path", "\x1b[31mred\x1b]0;title\x07"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_no_source_of_ours_unpickles() -> None:
    source = Path(__file__).parents[2] / "src"
    texts = {path.name: path.read_text(encoding="utf-8") for path in source.rglob("*.py")}
    banned = ("pickle.load", "yaml.load(", "allow_pickle=True", "exec(", "from pickle")
    found = {f"{name}: {word}" for name, text in texts.items() for word in banned if word in text}
    assert found == {"settings_file.py: yaml.load("}, "with a loader that is a SafeLoader"
    loads = [call for text in texts.values() for call in re.findall(r"torch\.load\([^\n]*", text)]
    assert loads, "checkpoints of others are read, or this shows nothing"
    assert all("weights_only=True" in call for call in loads)
    uses = {f"{name}: {use}" for name, text in texts.items() for use in re.findall(r"\bpickle\.(\w+)", text)}
    refusing = "_dcp.py: Unpickler"  # its find_class refuses what is not on a short list
    assert {use for use in uses if not use.endswith(": UnpicklingError")} == {refusing}
