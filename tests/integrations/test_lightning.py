"""The Lightning callback: growth between batches, and resuming after it to the same bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from aiether import GrowthConfig, GrowthPlan
from aiether.integrations.lightning import GrowthCallback

from .test_grow import same
from .tiny import Sequences, blocks, tiny_model, values


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


class Module(LightningModule):
    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.model = tiny_model("llama", dropout=0.0)
        blocks(self.model)[0].requires_grad_(not frozen)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class At(Callback):
    """Does something to the module before a batch."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.action(pl_module.model)


class Crash(Exception):
    pass


def crash(model: Any) -> None:
    raise Crash


def growth(**settings: Any) -> GrowthConfig:
    plain: dict[str, Any] = {
        "trigger": "fixed",
        "growth_fractions": (0.4,),
        "placement": "front",
        "grow_by": "double",
        "init": "noise",
        "protocol": "none",
        "lr_policy": "rewarm_new",
        "rewarm_steps": 4,
        "warmup_steps": 0,
        "collect_interval_steps": 1,
    }
    return GrowthConfig(**{**plain, **settings})


def fit(
    folder: Path,
    config: GrowthConfig,
    *extra: Callback,
    ckpt: int | None = None,
    module: Module | None = None,
    batch_size: int = 4,
    **settings: Any,
) -> tuple[Module, GrowthCallback, Trainer]:
    """Ten steps, each epoch one batch long: Lightning replays the data of a broken epoch from its start."""
    module, callback = module or Module(), GrowthCallback(config)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        max_steps=10,
        accelerator="cpu",
        callbacks=[callback, *extra, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    loaders = (
        DataLoader(Sequences(4, seed=1), batch_size=batch_size),
        DataLoader(Sequences(4, seed=2), batch_size=4),
    )
    trainer.fit(module, *loaders, ckpt_path=None if ckpt is None else folder / f"step={ckpt}.ckpt")
    return module, callback, trainer


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_that_crashed_after_a_growth_resumes_to_the_same_bits(tmp_path: Path, frozen: bool) -> None:
    whole, callback, _ = fit(tmp_path / "whole", growth(init="geometric"), module=Module(frozen=frozen))
    assert [report.plan.depth_after for report in callback.reports] == [4]
    assert [rewarm.finished for rewarm in callback.rewarms] == [True]
    with pytest.raises(Crash):
        fit(tmp_path / "cut", growth(init="geometric"), At(7, crash), module=Module(frozen=frozen))
    for step in (4, 6):  # the growth is due at 4 and not done yet; in the midst of the re-warm
        again, callback, trainer = fit(
            tmp_path / "cut", growth(init="geometric"), ckpt=step, module=Module(frozen=frozen)
        )
        assert trainer.global_step == 10
        assert len(callback.reports) == (1 if step == 4 else 0)
        assert same(dict(again.state_dict()), dict(whole.state_dict()))
        assert not again.model.training or all(m.training for m in again.model.modules())
        trains = [p.requires_grad for p in again.model.parameters()]
        assert trains == [p.requires_grad for p in whole.model.parameters()]
        assert (False in trains) == frozen


def test_a_run_cut_while_two_rewarms_overlap_resumes_to_the_same_bits(tmp_path: Path) -> None:
    twice = growth(growth_fractions=(0.3, 0.5), grow_by=1, rewarm_steps=6)
    whole, callback, _ = fit(tmp_path / "whole", twice)
    assert [report.plan.depth_after for report in callback.reports] == [3, 4]
    with pytest.raises(Crash):
        fit(tmp_path / "cut", twice, At(7, crash))
    again, _, _ = fit(tmp_path / "cut", twice, ckpt=6)
    assert same(dict(again.state_dict()), dict(whole.state_dict()))


def test_what_was_thawed_stays_so_after_a_resume(tmp_path: Path) -> None:
    """Lightning builds the module anew at a resume, with what its constructor freezes."""

    class Thawing(Module):
        def configure_optimizers(self) -> Any:
            built = super().configure_optimizers()
            if len(blocks(self.model)) == 2:
                blocks(self.model)[0].requires_grad_(True)
                built["optimizer"].param_groups[0]["params"] = list(self.model.parameters())
            return built

    fit(tmp_path, growth(), module=Thawing(frozen=True))
    again, _, _ = fit(tmp_path, growth(), ckpt=8, module=Thawing(frozen=True))
    assert all(p.requires_grad for p in again.model.parameters())


def test_every_new_tensor_trains_and_the_trigger_follows_the_validation_loss(tmp_path: Path) -> None:
    born: dict[str, torch.Tensor] = {}
    plateau = growth(trigger="plateau", pg_patience=1, pg_threshold=10.0, max_layers=3, grow_by=1)
    module, callback, _ = fit(tmp_path, plateau, At(2, lambda model: born.update(values(model))))
    (report,) = callback.reports
    assert report.plan == GrowthPlan.front(2, 3, init="noise")
    assert len(blocks(module.model)) == 3
    assert not [n for n, p in module.model.named_parameters() if n in born and torch.equal(born[n], p)]


def test_growth_waits_for_the_end_of_an_accumulation(tmp_path: Path) -> None:
    depths: list[tuple[int, int]] = []

    class Depths(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            depths.append((trainer.global_step, len(blocks(pl_module.model))))

    config = growth(trigger="plateau", pg_patience=1, pg_threshold=10.0, max_layers=3, grow_by=1)
    fit(tmp_path, config, Depths(), batch_size=1, accumulate_grad_batches=4, val_check_interval=2)
    assert depths[-1] == (10, 3)
    first = next(index for index, (_, depth) in enumerate(depths) if depth == 3)
    assert first % 4 == 0, "the model grew in the midst of an accumulation"


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="protocol='none'"):
        GrowthCallback("report")
    with pytest.raises(ValueError, match="no preset"):
        GrowthCallback("best")
    with pytest.raises(ValueError, match="forks of the model"):
        GrowthCallback(GrowthConfig(trigger="lag", protocol="none"))
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="manual optimization"):
        fit(tmp_path, growth(), module=module)
    silent = Module()
    silent.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="'val_loss' was logged"):
        fit(tmp_path, growth(), module=silent)


def test_a_module_of_another_depth_is_refused_at_resume(tmp_path: Path) -> None:
    fit(tmp_path, growth())
    other = Module()
    other.model = tiny_model("llama", 3, dropout=0.0)
    with pytest.raises(ValueError, match=r"grew through \[2, 4\] layers, this one has 3"):
        fit(tmp_path, growth(), ckpt=8, module=other)
