"""Folders of torch.distributed.checkpoint, written and read by the library itself around our growth."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.offline.files import Payload, anonymous_bytes, prove
from tests.integrations.tiny import Sequences, tiny_model, values
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from transformers import LlamaConfig

from aiether.growth import GrowthConfig, GrowthPlan, TrainingState, family_of, migrate, renames
from aiether.integrations.offline import grow_checkpoint, inspect_checkpoints
from aiether.integrations.offline._dcp import DistributedFolder

GROWTH = GrowthConfig(init="copy", placement="interleave")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Chunked(DefaultSavePlanner):
    """Saves every matrix in two pieces, as two processes with sharded parameters would."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in _halves(item)]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        start, rows = chunk.offsets[0], chunk.sizes[0]
        return self.state_dict[write_item.index.fqn].detach()[start : start + rows]


def _halves(item: WriteItem) -> list[WriteItem]:
    data = item.tensor_data
    if data is None or len(data.size) != 2:
        return [item]
    rows, columns = data.size
    pieces = []
    for start, stop in ((0, rows // 2), (rows // 2, rows)):
        offset = torch.Size((start, 0))
        chunk = ChunkStorageMetadata(offset, torch.Size((stop - start, columns)))
        tensor_data = dataclasses.replace(data, chunk=chunk)
        index = MetadataIndex(item.index.fqn, offset)
        pieces.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=tensor_data))
    return pieces


def trained(arch: str = "llama", depth: int = 3, steps: int = 2) -> tuple[Any, Any]:
    """A model in a plain loop with two groups of parameters."""
    model = tiny_model(arch, depth, dropout=0.0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    tokens = torch.stack([row["input_ids"] for row in (Sequences(4, 1)[i] for i in range(4))])
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, model: nn.Module, optimizer: Any, *, flat: bool, planner: Any = None) -> None:
    weights, moments = get_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
    )
    state = {"model": weights, "optimizer": moments, "step": torch.tensor(7), "loader": {"cursor": 3}}
    save_distributed(state, checkpoint_id=folder, planner=planner)
    getattr(model, "config").save_pretrained(folder)  # noqa: B009 - nn.Module has no `config`


def load(folder: Path, depth: int, *, flat: bool, arch: str = "llama") -> tuple[Any, Any, dict[str, Any]]:
    """What the library makes of a folder in a fresh model of some depth."""
    model, optimizer = trained(arch, depth, steps=0)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, moments = get_state_dict(model, optimizer, options=options)
    state = {"model": weights, "optimizer": moments, "step": torch.tensor(0), "loader": {"cursor": 0}}
    load_distributed(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    return model, optimizer, state


def moments_of(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("flat", "planner"), [(False, None), (True, Chunked)], ids=["nested and whole", "flat and sharded"]
)
def test_model_and_optimizer_go_on(flat: bool, planner: type[Chunked] | None, tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path / "ckpt-7", model, optimizer, flat=flat, planner=planner and planner())
    grown = grow_checkpoint(tmp_path / "ckpt-7", tmp_path / "grown", to_layers=5, growth=GROWTH)
    assert (grown.kind, grown.step, grown.has_optimizer) == ("distributed", 7, True)
    large, its_optimizer, state = load(tmp_path / "grown", 5, flat=flat)
    assert (int(state["step"]), state["loader"]["cursor"]) == (7, 3)
    expected = migrate(
        TrainingState(config=model.config.to_dict(), tensors=values(model)),
        grown.plan,
        growth=GROWTH,
        final_depth=5,
        seed=0,
    )
    for name, tensor in values(large).items():
        assert torch.equal(tensor, expected.state.tensors[name]), name
    old_moments, new_moments = moments_of(model, optimizer), moments_of(large, its_optimizer)
    for old, (own, *new) in renames(old_moments, grown.plan, family_of(model)).items():
        for key, value in old_moments[old].items():
            assert torch.equal(new_moments[own][key], value), (own, key)
            assert not any(new_moments[name][key].any() for name in new)
    assert [group["weight_decay"] for group in its_optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in its_optimizer.param_groups] == [1e-2, 1e-2]


def test_parameter_groups_name_the_new_tensors(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path / "ckpt", model, optimizer, flat=False)
    plan = grow_checkpoint(tmp_path / "ckpt", tmp_path / "grown", to_layers=5, growth=GROWTH).plan
    raw = DistributedFolder(tmp_path / "grown").raw("optimizer.param_groups.1.params")
    (tmp_path / "names").write_bytes(raw)
    vectors = [name for name, parameter in model.named_parameters() if parameter.ndim < 2]
    names = renames(vectors, plan, family_of(model))
    assert torch.load(tmp_path / "names", weights_only=True) == [new for old in vectors for new in names[old]]


@pytest.mark.parametrize("moments", ["copy", "reset"])
def test_moments_as_declared(moments: Any, tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path / "ckpt", model, optimizer, flat=False)
    growth = GrowthConfig(init="copy", placement="stack", moments=moments)
    grow_checkpoint(tmp_path / "ckpt", tmp_path / "grown", to_layers=4, growth=growth)
    folder = DistributedFolder(tmp_path / "grown")
    name = "optimizer.state.model.layers.3.mlp.up_proj.weight.exp_avg"
    if moments == "reset":
        assert not any(key.startswith("optimizer.state") for key in folder.entries)
        assert "optimizer.param_groups.0.lr" in folder.entries
    else:
        old = optimizer.state[model.model.layers[0].mlp.up_proj.weight]["exp_avg"]
        assert torch.equal(folder.tensor(name), old)


def test_a_bare_state_dict_without_a_word_for_the_model(tmp_path: Path) -> None:
    model = tiny_model("gpt2", 2)
    save_distributed(dict(model.state_dict()), checkpoint_id=tmp_path / "ckpt")
    model.config.save_pretrained(tmp_path / "config")
    growth = GrowthConfig(init="noise", placement="top")
    grow_checkpoint(
        tmp_path / "ckpt", tmp_path / "grown", to_layers=3, growth=growth, config=tmp_path / "config", seed=1
    )
    large = tiny_model("gpt2", 3, seed=4)
    load_distributed(large.state_dict(), checkpoint_id=tmp_path / "grown")
    state = TrainingState(config=model.config.to_dict(), tensors=values(model))
    expected = migrate(state, GrowthPlan.top(2, 3, "noise"), growth=growth, final_depth=3, seed=1)
    assert all(torch.equal(t, expected.state.tensors[name]) for name, t in values(large).items())


def test_history_and_inspection_read_them_too(tmp_path: Path) -> None:
    folders = [tmp_path / f"ckpt-{steps}" for steps in (1, 2, 3)]
    for steps, folder in enumerate(folders, start=1):
        save(folder, *trained(steps=steps), flat=False)
    growth = GrowthConfig(init="geometric", placement="stack", scale="displacement")
    grown = grow_checkpoint(folders[2], tmp_path / "grown", to_layers=4, growth=growth, history=folders[:2])
    assert grown.tensor_metrics["model.layers.3.mlp.up_proj.weight"]["num_snapshots"] == 3
    seen = inspect_checkpoints(folders)
    assert [layer.name for layer in seen.layers] == [f"model.layers.{i}" for i in range(3)]
    assert {tensor.name for tensor in seen.others} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }, "moments are no weights"


# What somebody with bad intent wrote


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "ckpt", *trained(), flat=False)
    return tmp_path / "ckpt"


def refused(folder: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        grow_checkpoint(folder, tmp_path / "grown", to_layers=4, growth=GROWTH)
    assert not (tmp_path / "grown").exists()


def test_metadata_that_would_run_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "MARKER"
    prove(marker)
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = Payload(marker)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, tmp_path, r"it names (pathlib\.Path\.write_text|builtins\.getattr|pathlib).*do not trust")
    assert not marker.exists()
    FileSystemReader(folder).read_metadata()
    assert marker.exists(), "the library itself would have run it"


def test_an_entry_that_would_run_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "MARKER"
    names = Payload(marker)
    state = {"model": tiny_model("llama", 3).state_dict(), "optimizer": {"param_groups": {"params": names}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_distributed(state, checkpoint_id=folder)
    refused(folder, tmp_path, "is no list of parameter names")
    assert not marker.exists()


def test_metadata_that_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    (tmp_path / "outside.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../outside.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, tmp_path, "outside of its folder: do not trust this folder")


def test_a_cut_file_is_named(folder: Path, tmp_path: Path) -> None:
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    refused(folder, tmp_path, "is damaged .*: copy it again")


def test_without_a_configuration_the_remedy_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, tmp_path, "name the model's configuration with --config FILE")


def test_an_interrupt_while_writing_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(folder, tmp_path / "grown", to_layers=4, growth=GROWTH, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]


def test_one_entry_is_read_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = DistributedFolder(folder)
    planned: list[int] = []
    read = FileSystemReader.read_data
    monkeypatch.setattr(
        FileSystemReader,
        "read_data",
        lambda self, plan, planner: planned.append(len(plan.items)) or read(self, plan, planner),
    )
    assert len(list(stored.model.values())) == len(planned)
    assert set(planned) == {1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_a_block_not_for_the_model(tmp_path: Path) -> None:
    layers, width, names = 8, 512, ("up_proj", "gate_proj", "down_proj", "more", "most")
    tensors = {
        f"model.layers.{layer}.mlp.{name}.weight": torch.ones(3 * width, width)
        for layer in range(layers)
        for name in names
    }
    config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4)
    config.save_pretrained(tmp_path / "ckpt")
    save_distributed({"model": tensors}, checkpoint_id=tmp_path / "ckpt")
    block = len(names) * 4 * 3 * width * width
    del tensors
    before, peak = anonymous_bytes(), 0

    def watch(done: int, total: int) -> None:
        nonlocal peak
        assert total == 2 * layers * block
        peak = max(peak, anonymous_bytes() - before)

    grow_checkpoint(tmp_path / "ckpt", tmp_path / "grown", to_layers=16, growth=GROWTH, progress=watch)
    assert peak < 4 * block == layers * block / 2
