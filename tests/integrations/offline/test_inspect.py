"""Checkpoints of anyone's: their geometry is that of a trajectory in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integrations.tiny import tiny_model, tiny_trainer
from torch import Tensor

from aiether.geometry import Trajectory, metrics_from_gram
from aiether.growth import GrowthConfig
from aiether.integrations import fit
from aiether.integrations.offline import inspect_checkpoints


def snapshots(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (5, 4),
        **{f"blocks.{i}.{n}": (4, 4) for i in range(12) for n in ("a.weight", "b")},
    }
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    found = []
    for _ in range(count):
        state = {n: t + 0.3 + torch.randn(t.shape, generator=generator) for n, t in state.items()}
        found.append(state)
    return found


def written(tmp_path: Path, names: tuple[str, ...], states: list[dict[str, Tensor]]) -> list[Path]:
    folders = [tmp_path / name for name in names]
    for folder, state in zip(folders, states, strict=True):
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
    return folders


def test_the_numbers_are_those_of_a_trajectory(tmp_path: Path) -> None:
    states = snapshots()
    names = ("s-100", "s-200", "s-300", "s-400")
    folders = written(tmp_path, names, [{**state, "counter": torch.tensor([1])} for state in states])
    trajectory = Trajectory(4)
    for step, state in enumerate(states):
        trajectory.append(state, step)
    seen = inspect_checkpoints([folders[2], folders[0], folders[3], folders[1]])
    assert seen.checkpoints == tuple((f"s-{step}", step) for step in (100, 200, 300, 400))
    assert seen.model.to_dict() == pytest.approx(
        metrics_from_gram(trajectory.gram(trajectory.names)).to_dict()
    )
    assert [layer.name for layer in seen.layers] == [f"blocks.{i}" for i in range(12)], "in numeric order"
    inner = [f"blocks.10.{name}" for name in ("a.weight", "b")]
    assert seen.layers[10].metrics.to_dict() == pytest.approx(
        metrics_from_gram(trajectory.gram(inner)).to_dict()
    )
    assert [tensor.name for tensor in seen.layers[10].tensors] == inner
    own = metrics_from_gram(trajectory.gram(inner[1]))
    assert seen.layers[10].tensors[1].metrics.to_dict() == pytest.approx(own.to_dict())
    assert [tensor.name for tensor in seen.others] == ["embed.weight"]
    assert seen.skipped == ("counter",)
    content = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    assert content["intervals"] == [100, 100, 100]
    assert content["layers"][10]["tensors"][1]["tau"] == own.tau


def test_two_stacks_are_two(tmp_path: Path) -> None:
    states = [
        {f"{side}.block.{i}.layer.0.w": torch.randn(3) for side in ("encoder", "decoder") for i in range(2)}
        for _ in range(3)
    ]
    seen = inspect_checkpoints(written(tmp_path, ("a", "b", "c"), states))
    names = ["decoder.block.0", "decoder.block.1", "encoder.block.0", "encoder.block.1"]
    assert [layer.name for layer in seen.layers] == names
    assert seen.label(seen.layers[0]) == names[0]


def test_order_and_interval(tmp_path: Path, trainer_run: Path) -> None:
    checkpoints = [trainer_run / f"checkpoint-{step}" for step in (12, 4, 8)]
    seen = inspect_checkpoints(checkpoints)
    assert [step for _, step in seen.checkpoints] == [4, 8, 12]
    assert seen.interval_note() == "One checkpoint every 4 steps."
    assert len(seen.layers) == 6
    whole = inspect_checkpoints([trainer_run])
    assert whole.to_dict() == seen.to_dict()
    # The step of a Trainer's checkpoint is what its state says, whatever the folder is called.
    shutil.copytree(checkpoints[0], tmp_path / "last-1")
    assert inspect_checkpoints([tmp_path / "last-1", *checkpoints[1:]]).checkpoints[-1] == ("last-1", 12)

    uneven = written(tmp_path, ("u-1000", "u-4000", "u-2000"), snapshots(3))
    assert "uneven (1,000, 2,000 steps)" in inspect_checkpoints(uneven).interval_note()
    plain = written(tmp_path, ("late", "early-7", "later"), snapshots(3))
    seen = inspect_checkpoints(plain)
    assert [name for name, _ in seen.checkpoints] == ["late", "early-7", "later"]
    assert "taken in the order given" in seen.interval_note()


def test_a_run_of_aiether_shows_its_window(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_model("gpt2", 2), max_steps=10, save_steps=10, eval_steps=5)
    growth = GrowthConfig(
        trigger="geometric", watch="all", placement="stack", collect_interval_steps=2, warmup_steps=90
    )
    fit(trainer, growth)
    files = sorted((tmp_path / "run" / "snapshots").iterdir())
    assert len(files) == 5
    seen = inspect_checkpoints([tmp_path / "run"])
    assert seen.intervals == [2, 2, 2, 2]
    assert [layer.name for layer in seen.layers] == ["transformer.h.0", "transformer.h.1"]
    trajectory = Trajectory(5)
    for step, file in enumerate(files):
        trajectory.append(load_file(file), step)
    assert seen.model.tau == pytest.approx(metrics_from_gram(trajectory.gram(trajectory.names)).tau)


def test_weights_that_do_not_move_are_no_division_by_zero(tmp_path: Path) -> None:
    seen = inspect_checkpoints(written(tmp_path, ("a", "b", "c"), snapshots(1) * 3))
    assert (seen.model.displacement, seen.model.participation_ratio) == (0, 0)
    json.dumps(seen.to_dict(), allow_nan=False)


def test_half_precision_and_mixed_dtypes(tmp_path: Path) -> None:
    first, second, third = snapshots(3)
    states = [{n: t.bfloat16() for n, t in first.items()}, second, {n: t.half() for n, t in third.items()}]
    seen = inspect_checkpoints(written(tmp_path, ("a", "b", "c"), states))
    wide = [{n: t.double() for n, t in state.items()} for state in states]
    (tmp_path / "wide").mkdir()
    expected = inspect_checkpoints(written(tmp_path / "wide", ("a", "b", "c"), wide))
    assert seen.model.to_dict() == pytest.approx(expected.model.to_dict())


# What is refused


def test_too_few(tmp_path: Path) -> None:
    folders = written(tmp_path, ("a-1", "a-2"), snapshots(2))
    with pytest.raises(ValueError, match=r"2 checkpoint\(s\) found: at least 3 are needed"):
        inspect_checkpoints(folders)
    with pytest.raises(ValueError, match="holds no series of checkpoints: name at least three"):
        inspect_checkpoints(folders[:1])
    with pytest.raises(ValueError, match="both of step 1"):
        inspect_checkpoints([folders[0], *folders])


def test_other_tensors_shapes_and_numbers(tmp_path: Path) -> None:
    one, two, three = snapshots(3)
    less = {name: tensor for name, tensor in two.items() if not name.startswith("blocks.11")}
    folders = written(tmp_path, ("a", "b", "c", "less"), [one, two, three, less])
    with pytest.raises(ValueError, match=r"less' lacks 2 tensors that .*c' has, such as 'blocks.11"):
        inspect_checkpoints([folders[0], folders[3], folders[2]])
    with pytest.raises(ValueError, match=r"less' lacks 2 tensors that .*a' has"):
        inspect_checkpoints([folders[0], folders[1], folders[3]])
    odd = written(tmp_path, ("odd",), [two | {"embed.weight": torch.zeros(4, 5)}])
    with pytest.raises(ValueError, match=r"'embed.weight' is \(4, 5\) in .*odd' and \(5, 4\) in"):
        inspect_checkpoints([folders[0], *odd, folders[2]])
    nan = written(tmp_path, ("nan",), [two | {"blocks.3.b": torch.full((4, 4), float("nan"))}])
    with pytest.raises(ValueError, match=r"'blocks.3.b' of .*nan' holds NaN or infinite values"):
        inspect_checkpoints([folders[0], *nan, folders[2]])
    whole = written(tmp_path, ("i", "j", "k"), [{"x": torch.arange(3)}] * 3)
    with pytest.raises(ValueError, match="holds no floating-point tensors"):
        inspect_checkpoints(whole)
