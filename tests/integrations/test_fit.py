from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import data_loader
from transformers import LlamaForCausalLM, PreTrainedModel

from aiether.growth import GrowthConfig
from aiether.integrations import FitResult, GrowthError, Row, RunObserver, _model, fit
from aiether.integrations._checkpoint import CheckpointStore
from aiether.training.optimizer import build_optimizer

from .tiny import tiny_model, tiny_trainer


def growth(**settings: Any) -> GrowthConfig:
    """Two growths, at a third and two thirds of the run."""
    plain: dict[str, Any] = {
        "trigger": "fixed",
        "growth_fractions": (0.3, 0.6),
        "placement": "stack",
        "grow_by": "double",
        "max_layers": 8,
        "protocol": "none",
        "warmup_steps": 0,
        "collect_interval_steps": 1,
        "history_window_size": 5,
        "scale": "displacement",
    }
    return GrowthConfig(**{**plain, **settings})


class Watch(RunObserver):
    """Keeps what the run says, and can stop it hard at a step, as a crash would."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at = crash_at
        self.rows: list[Row] = []
        self.evaluations: list[Row] = []
        self.events: list[Row] = []
        self.stages: list[tuple[int, int, int]] = []

    def on_stage(self, *, stage: int, step: int, model: PreTrainedModel, lineage: Any) -> None:
        assert model.config.num_hidden_layers == lineage.depth
        self.stages.append((stage, step, lineage.depth))

    def on_step(self, step: int, train_seconds: float) -> None:
        if step == self.crash_at:
            raise RuntimeError("crash")

    def on_log(self, row: Row) -> None:
        self.rows.append(row)

    def on_evaluate(self, row: Row) -> None:
        self.evaluations.append(row)

    def on_event(self, event: Row) -> None:
        self.events.append(event)


def muon(model: PreTrainedModel) -> torch.optim.Optimizer:
    return build_optimizer(model, "transformer.h", name="muon", lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))


def run(tmp_path: Path, config: GrowthConfig, watch: Watch | None = None, **settings: Any) -> FitResult:
    resume = settings.pop("resume", False)
    model = tiny_model(settings.pop("arch", "gpt2"))
    if settings.pop("own_muon", False):
        settings["optimizers"] = (muon(model), None)
    watch = watch or Watch()
    return fit(tiny_trainer(tmp_path, model, **settings), config, resume=resume, observers=[watch])


def weights(result: FitResult) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


ALGORITHMS = [
    pytest.param(growth(), {}, id="gpt2-stack-geometric"),
    pytest.param(growth(init="copy", moments="copy"), {"arch": "llama"}, id="llama-copy-moments"),
    pytest.param(growth(init="zero", placement="interleave"), {"own_muon": True}, id="muon-zero-interleave"),
    pytest.param(
        growth(init="random", placement="top", grow_by=1), {"optim": "adafactor"}, id="adafactor-random-top"
    ),
    pytest.param(growth(init="noise", moments="reset"), {"optim": "sgd"}, id="sgd-noise-reset"),
    pytest.param(
        growth(placement="front", grow_by=1, protocol="report", isolated_warmup_steps=3),
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        id="report-protocol",
    ),
    pytest.param(
        growth(
            protocol="report",
            isolated_warmup_steps=2,
            unfreeze="gradual",
            unfreeze_interval_steps=1,
            init="copy",
        ),
        {"gradient_accumulation_steps": 2},
        id="report-gradual-accumulation",
    ),
    pytest.param(
        growth(trigger="geometric", tau_crit=1e-3, kappa_crit=1e-3, pg_patience=2, pg_threshold=1.0),
        {},
        id="geometric-trigger",
    ),
]


def assert_finished_as_planned(result: FitResult, watch: Watch) -> None:
    growths = [event for event in watch.events if event["event"] == "growth"]
    assert (result.status, result.step) == ("finished", 24)
    assert len(growths) == result.num_growths == 2
    assert result.depth == result.model.config.num_hidden_layers == growths[-1]["depth_after"]
    assert [row["step"] for row in watch.rows] == sorted({row["step"] for row in watch.rows})
    assert all(event["loss_after"] > 0 and event["loss_before"] > 0 for event in growths)


@pytest.mark.parametrize(("config", "settings"), ALGORITHMS)
def test_grows_to_the_planned_depth_and_resumes_after_two_crashes_to_the_same_bits(
    tmp_path: Path, config: GrowthConfig, settings: dict[str, Any]
) -> None:
    whole, resumed = Watch(), Watch()
    expected = run(tmp_path / "whole", config, whole, **dict(settings))
    assert_finished_as_planned(expected, whole)
    for crash_at in (9, 16):
        with pytest.raises(RuntimeError, match="crash"):
            run(tmp_path / "cut", config, Watch(crash_at), **dict(settings), resume=True)
    actual = run(tmp_path / "cut", config, resumed, **dict(settings), resume=True)
    assert resumed.stages[0][1] > 0, "it started over instead of resuming"
    assert_same(weights(expected), weights(actual))
    assert resumed.evaluations[-1]["eval_loss"] == whole.evaluations[-1]["eval_loss"]
    known = {event["step"]: event["loss_after"] for event in whole.events if event["event"] == "growth"}
    assert all(e["loss_after"] == known[e["step"]] for e in resumed.events if e["event"] == "growth")


def checkpoints(tmp_path: Path) -> dict[tuple[int, int], Any]:
    store = CheckpointStore(tmp_path / "run")
    return {(c.step, c.stage): c for c in store.complete()}


def test_old_moments_go_by_name_and_new_ones_start_at_zero(tmp_path: Path) -> None:
    config = growth(growth_fractions=(0.5,), placement="front", grow_by=1, init="copy")
    run(tmp_path, config, save_steps=12)
    found = checkpoints(tmp_path)
    grown = found[(12, 1)].read_moments()
    assert (12, 0) not in found, "the stage ends at the growth: its checkpoint is the grown one"
    run(tmp_path / "static", growth(trigger="never", init="copy"), save_steps=12)
    before = checkpoints(tmp_path / "static")[(12, 0)].read_moments()
    prefix = "transformer.h."
    for name, entries in before.items():
        new_name = name
        if name.startswith(prefix):  # in front: every old block is one higher
            layer, suffix = name[len(prefix) :].split(".", 1)
            new_name = f"{prefix}{int(layer) + 1}.{suffix}"
        for key, value in entries.items():
            assert torch.equal(grown[new_name][key], value)  # type: ignore[arg-type]
    fresh = [name for name in grown if name.startswith(f"{prefix}0.")]
    assert fresh
    for name in fresh:
        assert all(not torch.as_tensor(value).any() for value in grown[name].values())


def test_step_schedule_and_data_position_continue(tmp_path: Path) -> None:
    static, grown = Watch(), Watch()
    run(tmp_path / "static", growth(trigger="never", init="copy"), static, lr_scheduler_type="cosine")
    run(tmp_path / "grown", growth(init="zero"), grown, lr_scheduler_type="cosine")
    rates = [(row["step"], row["learning_rate"]) for row in static.rows]
    assert [(row["step"], row["learning_rate"]) for row in grown.rows] == rates
    assert len(rates) == 12


def test_zero_growth_keeps_the_function_through_the_whole_hand_over(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, growth(init="zero"), watch)
    for event in watch.events:
        assert event["loss_after"] == pytest.approx(event["loss_before"], rel=1e-5)


def test_isolated_warm_up_moves_only_the_new_layers_at_a_tenth_of_the_rate(tmp_path: Path) -> None:
    config = growth(
        growth_fractions=(0.5,),
        placement="front",
        grow_by=1,
        protocol="report",
        isolated_warmup_steps=4,
        init="copy",
    )
    watch = Watch()
    run(tmp_path, config, watch, save_steps=1, lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    found = {step: checkpoint for (step, _), checkpoint in checkpoints(tmp_path).items()}

    def weights_at(step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(found[step].path / "model.safetensors")

    before, during, after = weights_at(12), weights_at(15), weights_at(20)
    for name in before:
        moved = not torch.equal(before[name], during[name])
        assert moved == name.startswith("transformer.h.0."), name
        assert not torch.equal(during[name], after[name]), name
    rates = {row["step"]: row["learning_rate"] for row in watch.rows}
    assert rates[14] == pytest.approx(0.1 * 3e-3)
    assert rates[18] == pytest.approx(1 / 2 * 3e-3)  # warm-up of the restarted schedule, second step
    assert rates[24] == pytest.approx(3e-3)
    assert [event["step"] for event in watch.events if event["event"] == "phase"] == [16]


def test_a_users_own_optimizer_and_scheduler_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "lr": 1e-4}], lr=1e-2, momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
    trainer = tiny_trainer(tmp_path, model, optimizers=(optimizer, scheduler))
    watch = Watch()
    result = fit(trainer, growth(init="copy"), observers=[watch])
    rebuilt = trainer.optimizer.optimizer  # type: ignore[union-attr]
    assert isinstance(rebuilt, torch.optim.SGD)
    assert result.depth == 8
    for group, shape in zip(rebuilt.param_groups, ({"weight_decay": 0.3}, {"initial_lr": 1e-4}), strict=True):
        assert shape.items() <= group.items()
        assert all((p.ndim > 1) == ("weight_decay" in shape) for p in group["params"])
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=24)
    expected = []
    for _ in range(24):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()
    assert [row["learning_rate"] for row in watch.rows] == pytest.approx(expected[1::2])


def test_what_the_user_froze_stays_frozen_in_copies_too(tmp_path: Path) -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." not in name)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fit(tiny_trainer(tmp_path, model), growth(init="copy"))
    final = result.model.state_dict()
    for layer in range(8):
        for suffix in ("mlp.c_fc.weight", "mlp.c_proj.bias"):
            assert torch.equal(
                final[f"transformer.h.{layer}.{suffix}"], start[f"transformer.h.{layer % 2}.{suffix}"]
            )
        assert not torch.equal(
            final[f"transformer.h.{layer}.attn.c_attn.weight"],
            start[f"transformer.h.{layer % 2}.attn.c_attn.weight"],
        )


@pytest.mark.parametrize(
    ("settings", "config", "says"),
    [
        ({"torch_compile": True}, growth(), "compile=True"),
        ({"ignore_data_skip": True}, growth(), "ignore_data_skip"),
        ({"load_best_model_at_end": True, "save_steps": 2}, growth(), "load_best_model_at_end"),
        ({"eval_strategy": "no"}, growth(trigger="geometric"), "eval_strategy"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, growth(), "save_strategy"),
    ],
)
def test_a_setup_that_would_go_wrong_is_refused(
    tmp_path: Path, settings: dict[str, Any], config: GrowthConfig, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        fit(tiny_trainer(tmp_path, **settings), config)


def test_a_scheduler_that_cannot_restart_is_refused_with_the_report_protocol(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = tiny_trainer(tmp_path, model, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        fit(trainer, growth(protocol="report"))


def test_resume_with_another_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, growth(), Watch(12))
    with pytest.raises(ValueError, match="24 steps"):
        run(tmp_path, growth(), max_steps=30, resume=True)


@pytest.mark.parametrize(("first", "then"), [("adamw_torch", "sgd"), ("sgd", "adamw_torch")])
def test_resume_with_another_optimizer_is_refused(tmp_path: Path, first: str, then: str) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, growth(), Watch(7), optim=first)
    with pytest.raises(ValueError, match="the moments of"):
        run(tmp_path, growth(), optim=then, resume=True)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    assert run(tmp_path, growth(), resume=True).step == 24


def test_a_new_tensor_without_gradient_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _model.build_model

    def detached(previous: PreTrainedModel, state: Any) -> PreTrainedModel:
        model = honest(previous, state)
        mlp = model.get_submodule("transformer.h.3.mlp")
        forward = mlp.forward
        mlp.forward = lambda hidden: forward(hidden).detach()
        return model

    monkeypatch.setattr(_model, "build_model", detached)
    with pytest.raises(GrowthError, match="no gradient"):
        run(tmp_path, growth(init="copy"))


def test_growth_in_bfloat16_keeps_what_is_computed_in_float32(tmp_path: Path) -> None:
    """A Llama's rotary frequencies are no parameter: cast with the weights, they change the function."""
    tiny_model("llama").save_pretrained(tmp_path / "small")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before["model.rotary_emb.inv_freq"].dtype == torch.float32
    result = fit(tiny_trainer(tmp_path, model), growth(init="copy"))
    after = dict(result.model.named_buffers())
    assert result.depth == 8
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert torch.equal(after[name], buffer)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_every_stage_copies_its_batches_as_the_user_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, non_blocking: bool
) -> None:
    """accelerate forgets the setting in the loaders of every stage but the first."""
    send, asynchronous = data_loader.send_to_device, []

    def noted(batch: Any, device: Any, **settings: Any) -> Any:
        asynchronous.append(settings["non_blocking"])
        return send(batch, device, **settings)

    monkeypatch.setattr(data_loader, "send_to_device", noted)
    run(tmp_path, growth(init="copy"), eval_strategy="no", accelerator_config={"non_blocking": non_blocking})
    assert len(asynchronous) >= 24
    assert set(asynchronous) == {non_blocking}
