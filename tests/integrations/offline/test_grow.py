"""Model folders grown on the disk: the same tensors as `migrate`'s, whole or not at all, in little memory."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.integrations.offline.files import anonymous_bytes, edit, same, stored
from tests.integrations.tiny import tiny_model, values
from transformers import AutoModelForCausalLM, LlamaConfig

from aiether.data.tokenizer import train_tokenizer
from aiether.geometry import Trajectory
from aiether.growth import GrowthConfig, GrowthPlan, TrainingState, migrate
from aiether.growth.config import Initialiser, Placement
from aiether.integrations.offline import _write, grow_checkpoint
from aiether.integrations.offline._tensors import SafetensorsFiles, Spec
from aiether.integrations.offline._write import SafetensorsWriter

GROWTH = GrowthConfig(init="copy", placement="stack")
HOW = [(placement, "copy") for placement in get_args(Placement)] + [
    ("stack", init) for init in get_args(Initialiser) if init not in ("copy", "geometric")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", 3).save_pretrained(tmp_path / "model", max_shard_size="6KB")
    return tmp_path / "model"


@pytest.mark.parametrize(("placement", "init"), HOW)
@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
def test_it_is_migrate_carried_out_in_files(
    arch: str, placement: Placement, init: Initialiser, tmp_path: Path
) -> None:
    model = tiny_model(arch, 3).bfloat16() if arch == "llama" else tiny_model(arch, 3)
    model.save_pretrained(tmp_path / "model", max_shard_size="6KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    growth = GrowthConfig(init=init, placement=placement)
    grown = grow_checkpoint(
        tmp_path / "model", tmp_path / "grown", to_layers=5, growth=growth, max_shard_size="9KB", seed=3
    )
    state = TrainingState(config=model.config.to_dict(), tensors=stored(tmp_path / "model"))
    expected = migrate(state, grown.plan, growth=growth, final_depth=5, seed=3)
    assert same(stored(tmp_path / "grown"), dict(expected.state.tensors))
    assert grown.tensor_metrics == expected.tensor_metrics
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype="auto")
    assert loaded.config.num_hidden_layers == 5
    for name, tensor in stored(tmp_path / "grown").items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_zero_keeps_the_function(folder: Path, tmp_path: Path) -> None:
    growth = GrowthConfig(init="zero", placement="interleave")
    grow_checkpoint(folder, tmp_path / "grown", to_layers=6, growth=growth)
    ids = torch.arange(12)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(place).eval()(ids).logits
        for place in (folder, tmp_path / "grown")
    ]
    assert torch.allclose(*logits, rtol=1e-5, atol=1e-6)


def test_geometric_is_that_of_a_trajectory(tmp_path: Path) -> None:
    trajectory, folders = Trajectory(4), [tmp_path / f"ckpt-{step}" for step in (10, 20, 30, 40)]
    model = tiny_model("llama", 2)
    for number, place in enumerate(folders):
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(number + len(name))
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(place)
        trajectory.append(values(model), 10 * (number + 1))
    growth = GrowthConfig(init="geometric", placement="stack", scale="displacement")
    grown = grow_checkpoint(
        folders[3],
        tmp_path / "grown",
        to_layers=4,
        growth=growth,
        history=[folders[2], folders[0], folders[1]],
    )
    state = TrainingState(config=model.config.to_dict(), tensors=values(model))
    plan = GrowthPlan.stack(2, 4, "geometric")
    expected = migrate(state, plan, growth=growth, trajectory=trajectory, final_depth=4, seed=0)
    written = stored(tmp_path / "grown")
    assert written.keys() == expected.state.tensors.keys()
    for name, tensor in expected.state.tensors.items():
        assert torch.allclose(written[name], tensor, rtol=1e-6, atol=1e-8), name
    metrics = grown.tensor_metrics["model.layers.3.mlp.up_proj.weight"]
    assert metrics["num_snapshots"] == 4
    assert metrics["relative_change"] > 0.01
    record = json.loads((tmp_path / "grown" / "aiether_growth.json").read_text())
    assert record["history"] == ["ckpt-10", "ckpt-20", "ckpt-30"]


def test_what_belongs_to_the_model_comes_along_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from"] * 3, 280).save(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for foreign in ("README.md", "modeling_x.py", "pytorch_model.bin", "optimizer.bin"):
        (folder / foreign).write_text("raise SystemExit")
    edit(folder / "config.json", of_my_own={"kept": 1})
    grow_checkpoint(folder, tmp_path / "grown", to_layers=4, growth=GROWTH)
    names = {path.name for path in (tmp_path / "grown").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "aiether_growth.json",
    }
    assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    before = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "grown" / "config.json").read_text()) == before | {"num_hidden_layers": 4}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_a_block_not_for_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    layer = {
        "self_attn.q_proj": (256, 256),
        "self_attn.o_proj": (256, 256),
        "mlp.up_proj": (2048, 256),
        "mlp.gate_proj": (2048, 256),
        "mlp.down_proj": (256, 2048),
    }
    tensors = {f"model.layers.{i}.{n}.weight": torch.ones(s) for i in range(12) for n, s in layer.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    new_bytes, block = 2 * sum(t.nbytes for t in tensors.values()), 4 * sum(a * b for a, b in layer.values())
    del tensors
    before, peak = anonymous_bytes(), 0

    def watch(done: int, total: int) -> None:
        nonlocal peak
        assert total == new_bytes
        peak = max(peak, anonymous_bytes() - before)

    grow_checkpoint(tmp_path, tmp_path / "grown", to_layers=24, growth=GROWTH, progress=watch)
    assert peak < 4 * block < new_bytes / 5


def test_tensors_of_all_kinds_are_laid_out_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.arange(5, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3, 3).bfloat16().T,
        "empty": torch.zeros(0, 4),
        "truth": torch.tensor([True, False, True]),
        "small": torch.randn(2, 3).to(torch.float8_e4m3fn),
    }
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].double(), tensor.double())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    files = SafetensorsFiles.of_file(tmp_path / "x.safetensors")
    assert {name: files.spec(name) for name in files} == specs


def test_old_tensors_are_copied_where_the_system_cannot_do_it_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EXDEV, "between file systems")

    grow_checkpoint(folder, tmp_path / "inside", to_layers=4, growth=GROWTH)
    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(_write, "_PIECE", 100)
    grow_checkpoint(folder, tmp_path / "outside", to_layers=4, growth=GROWTH)
    one, other = (tmp_path / name / "model.safetensors" for name in ("inside", "outside"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_written_is_flushed_on_the_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    threads: set[str] = set()
    sync = os.fsync

    def note(descriptor: int) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        if failing:
            raise OSError(errno.EIO, "the disk is broken")
        sync(descriptor)

    monkeypatch.setattr(_write, "_FLUSH", 1000)
    monkeypatch.setattr(os, "fsync", note)
    if failing:
        with pytest.raises(OSError, match="the disk is broken"):
            grow_checkpoint(folder, tmp_path / "grown", to_layers=4, growth=GROWTH)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    else:
        grow_checkpoint(folder, tmp_path / "grown", to_layers=4, growth=GROWTH)
        assert threads == {"flush", "MainThread"}


def test_a_run_of_aiether_and_its_checkpoint_are_read(tmp_path: Path) -> None:
    from tests.integrations.tiny import tiny_trainer

    from aiether.integrations import fit

    trainer = tiny_trainer(tmp_path, tiny_model("gpt2", 2), max_steps=4, save_steps=2, eval_steps=2)
    fit(trainer, GrowthConfig(trigger="never"))
    grown = grow_checkpoint(tmp_path / "run", tmp_path / "grown", to_layers=3, growth=GROWTH)
    assert (grown.kind, grown.step) == ("aiether", 4)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    again = grow_checkpoint(newest, tmp_path / "again", to_layers=3, growth=GROWTH)
    assert same(stored(tmp_path / "grown"), stored(tmp_path / "again"))
    assert again.step == 4
    assert not list((tmp_path / "grown").glob("moments*"))


# What is refused, with nothing left behind


def refused(folder: Path, tmp_path: Path, match: str, **settings: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments: dict[str, Any] = {"to_layers": 4, "growth": GROWTH, **settings}
    with pytest.raises(ValueError, match=match):
        grow_checkpoint(folder, tmp_path / "deep" / "grown", **arguments)
    assert sorted(tmp_path.rglob("*")) == before, "it left something"


def test_nothing_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("there", "dangling"):
        with pytest.raises(ValueError, match="exists already: name a new folder"):
            grow_checkpoint(folder, tmp_path / name, to_layers=4, growth=GROWTH)
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors", 7]
)
def test_an_index_that_leads_out_of_the_folder(folder: Path, tmp_path: Path, shard: Any) -> None:
    index = folder / "model.safetensors.index.json"
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "outside.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], shard)
    index.write_text(json.dumps(content))
    refused(folder, tmp_path, "do not trust this folder")


def test_pickled_weights(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, tmp_path, "only pytorch_model.bin, which can run code.*save_pretrained")


def test_an_index_that_places_a_tensor_where_it_is_not(folder: Path, tmp_path: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, own = next(iter(content["weight_map"].items()))
    content["weight_map"][first] = next(s for s in content["weight_map"].values() if s != own)
    index.write_text(json.dumps(content))
    refused(folder, tmp_path, f"lacks '{first}'")


def test_a_cut_shard(folder: Path, tmp_path: Path) -> None:
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(folder, tmp_path, f"{shard.name} is damaged")


def test_a_configuration_of_another_depth(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=2)
    refused(folder, tmp_path, r"states 2 layers, the tensors hold layers \[0, 1, 2\]")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is damaged"),
        ('{"model_type": "llama", "hidden_size": "x"}', "no configuration of a llama model"),
    ],
)
def test_a_damaged_configuration(folder: Path, tmp_path: Path, content: str, match: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, tmp_path, match)


def test_settings_that_cannot_work(folder: Path, tmp_path: Path) -> None:
    geometric = GrowthConfig(init="geometric", placement="stack")
    refused(folder, tmp_path, "the model has 3 layers already", to_layers=3)
    refused(folder, tmp_path, r"max_layers is 3, below to_layers \(4\)", max_layers=3)
    refused(folder, tmp_path, "max_shard_size is '5 apples'", max_shard_size="5 apples")
    refused(folder, tmp_path, "max_shard_size is '0GB'", max_shard_size="0GB")
    refused(
        folder, tmp_path, "name 2 or more earlier ones with --history", growth=geometric, history=[folder]
    )
    refused(folder, tmp_path, "only used by init 'geometric'", history=[folder, folder])
    refused(tmp_path / "none", tmp_path, "is not a folder")
    refused(folder, tmp_path, "config.json is missing", config=tmp_path)


def test_a_history_of_another_shape_depth_or_time(folder: Path, tmp_path: Path, trainer_run: Path) -> None:
    growth = GrowthConfig(init="geometric", placement="stack")
    ckpts = [trainer_run / f"checkpoint-{step}" for step in (4, 8, 12)]
    refused(ckpts[2], tmp_path, "has, such as", to_layers=8, growth=growth, history=[ckpts[0], folder])
    narrow = tiny_model("llama", 6)
    narrow.model.layers[0].mlp.up_proj.weight.data = torch.zeros(8, 16)
    narrow.save_pretrained(tmp_path / "narrow")
    refused(
        ckpts[2], tmp_path, r"is \(8, 16\) in .*narrow' and \(32, 16\)", to_layers=8, growth=growth,
        history=[tmp_path / "narrow", ckpts[1]],
    )  # fmt: skip
    refused(ckpts[1], tmp_path, "comes after", to_layers=8, growth=growth, history=[ckpts[0], ckpts[2]])
    refused(ckpts[2], tmp_path, "both of step 4", to_layers=8, growth=growth, history=[ckpts[0], ckpts[0]])


def test_an_interrupt_leaves_no_half_folder(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(folder, tmp_path / "a" / "grown", to_layers=6, growth=GROWTH, progress=stop)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            ValueError, match=r"could not be written .* nothing of it was kept: free some space"
        ):
            grow_checkpoint(folder, tmp_path / "grown", to_layers=12, growth=GROWTH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_room_is_known_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(folder, tmp_path, "1.0 kB are free in")
