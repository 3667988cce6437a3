"""Training a retrofitted model toward its targets, by a small loop that goes on from its state bit by bit."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiether.evaluation.loss import check_bf16
from aiether.integrations import sync_file, write_json
from aiether.toroidal import attention_modules, set_progress, torus_terms
from aiether.toroidal.storage import main_dtype

from .adapters import adapter_layers, add_adapters, remove_adapters
from .config import TuneConfig
from .losses import transfer_loss, tuning_loss

Batches = Callable[[int], Tensor]
"""The windows of a forward pass by its number, int64 (B, T)."""
STATE, TENSORS = "state.json", "state.safetensors"
_FIRST_SCALE, _GROWTH_INTERVAL = 2.0**13, 200
"""Of the loss in float16, doubled after so many steps: a gradient of 1e-8 is a number, one of 4 finite."""


@dataclass
class Tuned:
    """What tuning came to.

    Attributes
    ----------
    rows: of each step: `step`, `stage`, `progress`, and the losses of its stage in nats per token; `skipped`
        where float16 could not hold a gradient.
    trained: parameters that were trained.
    seconds: that it took; those of calls that were stopped count up to their last saved state.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    trained: int = 0
    seconds: float = 0.0


def tune(
    model: Any,
    batches: Batches,
    config: TuneConfig,
    *,
    state_dir: Path | None = None,
    about: str = "",
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Tuned:
    """Train the terms of a retrofitted model, and adapters or weights beside them, in place.

    At the end progress is 1 and adapters are merged. A batch depends on its number alone.

    Args:
        state_dir: where the state is kept, and gone on from if there is one of the same settings and `about`.
        about: what else a state must agree in, as the text and the model that batches and weights are of.
        report: told each step's row.

    Raises
    ------
    ValueError
        If the state is of other settings, a loss is not finite, gradients never are in float16, or the device
        cannot mix the types that are asked for.
    """
    loop = _Loop(model, config, about)
    tuned = Tuned(trained=sum(p.numel() for p in loop.trained.values()))
    try:
        first = loop.restore(state_dir, tuned)
        began = time.perf_counter() - tuned.seconds
        for step in range(first, config.all_steps):
            tuned.rows.append(loop.step(step, batches))
            tuned.seconds = time.perf_counter() - began
            if report is not None:
                report(tuned.rows[-1])
            if state_dir is not None and (step + 1) % config.save_interval == 0:
                loop.save(state_dir, tuned, step + 1)
        if tuned.rows and all(row.get("skipped") for row in tuned.rows):
            raise ValueError(
                "no step was taken, since no gradient was finite in float16: load the model in another type"
            )
        set_progress(model, 1.0)
        remove_adapters(model, merge=True)
    finally:
        loop.leave()
    return tuned


class _Loop:
    """One tuning: what is trained, the optimizer, and its state on disk."""

    def __init__(self, model: Any, config: TuneConfig, about: str) -> None:
        self.model, self.config, self.about = model, config, about
        if any(adapter_layers(model)):
            raise ValueError(
                "the model has adapters already, which tuning would take for its own: merge them into it "
                "first (merge_and_unload)"
            )
        torch.manual_seed(config.seed)
        self.computed_in = computed_in(model, config)
        self.scaler = torch.amp.GradScaler(
            model.device.type,
            init_scale=_FIRST_SCALE,
            growth_interval=_GROWTH_INTERVAL,
            enabled=self.computed_in is torch.float16,
        )
        self.required = {name: p.requires_grad for name, p in model.named_parameters()}
        self.stored: dict[str, torch.dtype] = {}
        self.originals: dict[str, Tensor] = {}
        self.training, self.checkpointed = model.training, model.is_gradient_checkpointing
        layers = model.config.toroidal["layers"]
        if config.tune == "lora":
            add_adapters(model, layers, rank=config.lora_rank, alpha=config.lora_alpha)
        model.requires_grad_(False)
        terms = {id(p) for each in torus_terms(model) for p in each.parameters()}
        beside = {id(p) for p in self._beside(layers)} - terms
        self.trained: dict[str, Tensor] = {}
        groups: list[list[Tensor]] = [[], []]
        for name, parameter in model.named_parameters():
            if id(parameter) in terms or id(parameter) in beside:
                if id(parameter) in beside and config.tune == "full":
                    self.stored[name], self.originals[name] = parameter.dtype, parameter.detach().clone()
                parameter.data = parameter.data.float()  # master weights
                parameter.requires_grad_(True)
                self.trained[name] = parameter
                groups[id(parameter) in terms].append(parameter)
        rates = (config.lr, config.terms_lr)
        held = [{"params": g, "lr": r, "base": r} for g, r in zip(groups, rates, strict=True) if g]
        self.optimizer = torch.optim.AdamW(held, weight_decay=config.weight_decay)
        model.train()
        if config.gradient_checkpointing:
            _switch(model, "enable", {"use_reentrant": False})

    def _beside(self, layers: list[int]) -> Iterator[Tensor]:
        if self.config.tune == "full":
            for attention in attention_modules(self.model, layers):
                yield from attention.parameters()
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                yield parameter

    def step(self, step: int, batches: Batches) -> dict[str, Any]:
        config = self.config
        progress, factor = config.progress_at(step), config.rate_at(step)
        set_progress(self.model, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor
        transfer = step < config.transfer_steps
        sums: dict[str, Tensor] = {}
        for number in range(config.accumulation):
            ids_BT = batches(step * config.accumulation + number).to(self.model.device)
            with self._autocast():
                if transfer:
                    loss = transfer_loss(self.model, ids_BT, self.originals)
                    parts = {"transfer": loss.detach()}
                else:
                    loss, parts = tuning_loss(
                        self.model, ids_BT, self.originals,
                        kl_weight=config.kl_weight, hidden_weight=config.hidden_weight,
                    )  # fmt: skip
            self.scaler.scale(loss / config.accumulation).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value / config.accumulation
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), config.max_grad_norm)
        row = {"step": step + 1, "stage": "transfer" if transfer else "tune", "progress": progress}
        row |= {name: value.item() for name, value in sums.items()}
        if not all(torch.isfinite(value) for value in sums.values()):
            raise ValueError(
                f"the loss is not finite in step {step + 1} ({row}): choose smaller rates (lr, terms_lr), or "
                "a longer ramp"
            )
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise ValueError(
                f"gradients are not finite in step {step + 1}, though the loss is ({row}): choose smaller "
                "rates (lr, terms_lr), or a longer ramp"
            )
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        scale = self.scaler.get_scale()  # 1 where nothing is scaled
        if scale < before:  # a gradient left float16, and no step was taken
            row["skipped"] = True
        if scale < 1:
            raise ValueError(
                f"gradients are not finite in step {step + 1}, however small the loss is scaled: load the "
                "model in another type"
            )
        self.optimizer.zero_grad(set_to_none=True)
        return row

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """What is trained is float32, whatever type the other weights have."""
        with torch.autocast(self.model.device.type, self.computed_in, enabled=self.computed_in is not None):
            yield

    def leave(self) -> None:
        """The model as a user had it: types of the weights, what wants gradients, mode, checkpointing."""
        remove_adapters(self.model, merge=False)  # interrupted: what they learned is in the state
        for name, parameter in self.model.named_parameters():
            if name in self.stored:
                parameter.data = parameter.data.to(self.stored[name])
            parameter.requires_grad_(self.required.get(name, True))
            parameter.grad = None
        if self.config.gradient_checkpointing and not self.checkpointed:
            _switch(self.model, "disable")
        self.model.train(self.training)

    def save(self, folder: Path, tuned: Tuned, step: int) -> None:
        """Trained tensors, moments and the random state under a new name; then the record that names it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight.{name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.model.device)
        path = folder / f"{step:08d}-{TENSORS}"
        partial = path.with_name(path.name + ".partial")
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial)
        sync_file(partial)
        partial.replace(path)
        record = {"step": step, "tensors": path.name, "settings": self._settings(), "rows": tuned.rows}
        record |= {"seconds": tuned.seconds, "scaler": self.scaler.state_dict()}
        write_json(folder / STATE, record)
        for old in folder.glob(f"*-{TENSORS}"):
            if old != path:
                old.unlink()

    def restore(self, folder: Path | None, tuned: Tuned) -> int:
        """The step to go on with."""
        if folder is None or not (folder / STATE).is_file():
            return 0
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if record["settings"] != self._settings():
            raise ValueError(
                f"{folder} holds the state of a tuning with other settings: choose another output_dir, or "
                "remove it"
            )
        tensors = load_file(folder / record["tensors"])
        for name, parameter in self.trained.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight.{name}"])
            if f"step.{name}" not in tensors:  # no step was taken yet: none had finite gradients
                continue
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"{key}.{name}"]
                state[key] = value if key == "step" else value.to(parameter.device)
            self.optimizer.state[parameter] = state
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.model.device)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(record["scaler"])
        tuned.rows[:], tuned.seconds = record["rows"], record.get("seconds", 0.0)
        return int(record["step"])

    def _settings(self) -> str:
        """A digest of everything that the state depends on.

        Settings that came later are in it where they are used, so that what was begun before them goes on.
        """
        held = {**self.model.config.toroidal, "progress": None, "backend": "auto"}
        names = {name: list(p.shape) for name, p in self.trained.items()}
        settings = asdict(self.config)
        if settings["hidden_weight"] == 0:
            del settings["hidden_weight"]
        told = [settings, held, names, self.about, str(self.computed_in)]
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def computed_in(model: Any, config: TuneConfig) -> torch.dtype | None:
    """The type of autocast: bfloat16 where it is asked for, else that of most of a half model's numbers."""
    main = main_dtype(dict(model.named_parameters()))
    check_bf16(model, config.bf16)
    if config.bf16:
        return torch.bfloat16
    return main if main in (torch.float16, torch.bfloat16) else None


def _switch(model: Any, way: str, *given: Any) -> None:
    """Gradient checkpointing on or off, by the name that this version of transformers has for it."""
    renamed = getattr(model, f"activation_checkpointing_{way}", None)
    (renamed or getattr(model, f"gradient_checkpointing_{way}"))(*given)
