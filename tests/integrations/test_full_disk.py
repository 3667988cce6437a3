"""Disks that are really full: a small file system where one may be mounted, and a file size limit."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from aiether.integrations import CheckpointStore, RunFault, fit, is_disk_full
from aiether.integrations._checkpoint import RunRecord

from .test_fit import Watch, assert_same, growth, weights
from .tiny import tiny_model, tiny_trainer

STEPS = 12
Disk = Callable[[int], None]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file of this process grows beyond `nbytes` (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Disk]]:
    """A folder, and what sets the size in bytes of the file system under it (ENOSPC)."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(nbytes: int, *options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={nbytes}", *options)), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount(1 << 30):
        pytest.skip("no file system may be mounted here; test_a_file_size_limit shows the same")
    try:
        yield folder, lambda nbytes: None if mount(nbytes, "remount") else pytest.fail("remount")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run(folder: Path, watch: Watch | None = None, *, resume: bool = False, **settings: Any) -> Any:
    plain = {"max_steps": STEPS, "save_steps": 4, "eval_steps": 4, "save_total_limit": 2}
    config = settings.pop("config", growth(growth_fractions=(0.75,), collect_interval_steps=4))
    trainer = tiny_trainer(folder, tiny_model(), **{**plain, **settings})
    return fit(trainer, config, resume=resume, observers=[watch or Watch()])


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


class Filling(Watch):
    """Leaves `left` bytes on the disk after a step."""

    def __init__(self, step: int, folder: Path, disk: Disk, left: int) -> None:
        super().__init__()
        self.step, self.fill = step, lambda: disk(used(folder) + left)

    def on_step(self, step: int, train_seconds: float) -> None:
        if step == self.step:
            self.fill()


def test_the_last_checkpoint_stays_and_the_run_goes_on_with_room(
    disk: tuple[Path, Disk], tmp_path: Path
) -> None:
    folder, resize = disk
    expected = run(tmp_path / "whole")
    with pytest.raises(
        RunFault, match=r"^the checkpoint of step 8 could not be written \(.*No space"
    ) as full:
        run(folder, Filling(5, folder, resize, left=20_000))
    said, store = str(full.value), CheckpointStore(folder / "run")
    assert "\n" not in said
    assert "Free some space there, then go on with" in said
    newest = store.latest()
    assert newest is not None
    assert (newest.step, full.value.checkpoint) == (4, newest.path)
    assert [path.name for path in (folder / "run").rglob(".*")] == [], "half of a checkpoint lies there"
    resize(1 << 30)
    assert_same(weights(expected), weights(run(folder, resume=True)))


def test_what_would_go_anyway_goes_first_to_make_room(disk: tuple[Path, Disk]) -> None:
    """Two checkpoints are kept and a third one fits only without the oldest."""
    folder, resize = disk
    watch = Filling(9, folder, resize, left=60_000)
    assert run(folder, watch, config=growth(trigger="never", init="copy")).status == "finished"
    assert [c.step for c in CheckpointStore(folder / "run").complete()] == [8, 12]


def test_a_window_on_a_full_disk_is_an_error_and_no_fatal_signal(disk: tuple[Path, Disk]) -> None:
    folder, resize = disk
    trainer = tiny_trainer(folder, tiny_model(), max_steps=STEPS, save_steps=100)
    config = growth(growth_fractions=(0.75,), snapshot_storage="disk", collect_interval_steps=4)
    with pytest.raises(RunFault, match="No space left"):
        fit(trainer, config, observers=[Filling(3, folder, resize, left=8_000)])
    assert [path.name for path in (folder / "run" / "window").iterdir()] == []


@pytest.mark.parametrize("limit", [30_000, 3_000, 300], ids=["weights", "moments or snapshot", "marker"])
def test_a_file_size_limit(tmp_path: Path, limit: int) -> None:
    """Wherever in a checkpoint the room ends: those before stay whole, nothing is left of the new one."""
    store = CheckpointStore(tmp_path)

    def write(step: int) -> None:
        store.write_snapshot(step, {"w": torch.zeros(500 if step > 1 else 1)})
        store.write(
            step=step,
            stage=0,
            save_model=lambda folder: tiny_model(depth=1 + step).save_pretrained(folder),
            moments={"w": {"exp_avg": torch.zeros(500)}},
            record=RunRecord(total_steps=9, controller={}, snapshot_steps=[step]),
        )

    write(1)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with largest_file(limit), pytest.raises(Exception, match=r"[Ff]ile too large") as error:
        write(2)
    assert is_disk_full(error.value)
    left = [path.name for path in tmp_path.rglob("*") if path.name not in before]
    assert left in ([], ["step-00000002.safetensors"])  # a whole snapshot, which the next try uses
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    write(2)
    assert [c.step for c in store.complete()] == [1, 2]


def test_a_run_under_a_file_size_limit_ends_in_one_line_and_goes_on_without_it(tmp_path: Path) -> None:
    class Limit(Watch):
        def on_step(self, step: int, train_seconds: float) -> None:
            if step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    expected = run(tmp_path / "whole")
    with (
        largest_file(resource.RLIM_INFINITY),
        pytest.raises(RunFault, match=r"^the checkpoint of step 8 could not be written \(.*File too"),
    ):
        run(tmp_path, Limit())
    assert_same(weights(expected), weights(run(tmp_path, resume=True)))
