"""Screen training recipes, static and grown, on one GPU per process: losses against FLOPs and seconds.

    python benchmarks/recipe.py ARMS.json --data DIR --out RESULTS.jsonl [--worker 0/2] [--budget_s 500]

A plain training loop around the product's own parts: its models, optimizers, compiled blocks and head, its
controller, which decides, and its `migrate`, which grows. No Trainer, no checkpoints: a screening run costs
its training alone. Results: docs/recipe.md.

ARMS.json holds {"base": {...}, "arms": [{"name": ..., ...}, ...]}: differences from `Arm`'s defaults, growth
settings under "growth". DIR holds train.bin and val.bin (uint16 tokens). Arms whose name and seed are in
RESULTS.jsonl already are skipped; with --worker I/N a process takes every N-th arm.

Under WSD runs of several lengths share their constant phase: an arm trains once to its longest end, and for
every entry of `ends` its state is copied at that length's decay, decayed, measured, and put back. Each end
is therefore exactly the run of that length, with the same data order.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from _machine import about
from aiether.evaluation import flops_per_token
from aiether.growth import GrowthConfig, GrowthController, family_of, planned_depth
from aiether.integrations import Rewarm, causal_loss
from aiether.integrations._model import compile_blocks, grow_model, names_of_layers
from aiether.integrations._optimizer_state import capture_moments, load_moments
from aiether.training.model import build_model
from aiether.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Arm:
    """One recipe. `ends` are its lengths in steps; growth fractions count from the longest."""

    name: str
    n_layer: int = 12
    n_embd: int = 512
    n_head: int = 8
    arch: str = "gpt2"
    vocab_size: int = 16384
    context_length: int = 512
    batch_size: int = 64
    small_batch_size: int | None = None  # until the first growth
    ends: tuple[int, ...] = (2000,)
    optimizer: str = "adamw"
    lr: float = 2e-3
    lr_depth_power: float = 0.0  # the rate at depth L is lr * (max_layers / L) ** lr_depth_power
    lr_warmup_steps: int = 100
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    eval_interval_steps: int = 100
    eval_windows: int = 1280
    probe_windows: int = 128  # of the evaluations that only the trigger needs
    seed: int = 0
    cuda_graphs: bool = True
    growth: dict[str, Any] = field(default_factory=dict)

    def growth_config(self) -> GrowthConfig:
        never = {"trigger": "never", "protocol": "none", "max_layers": self.n_layer}
        plain = {"protocol": "none", "placement": "stack", "init": "copy", "trigger": "fixed"}
        settings: dict[str, Any] = {**plain, **self.growth} if self.growth else never
        return GrowthConfig(**_with_tuples(settings))


class Windows:
    """Tokens on the device, in an order that depends on the seed and the count of windows seen alone."""

    def __init__(self, tokens: Tensor, context_length: int, seed: int) -> None:
        self.tokens, self.context_length, self.seed = tokens, context_length, seed
        self.num_windows = len(tokens) // context_length
        self._epoch, self._permutation = -1, [0]

    def take(self, start: int, count: int) -> Tensor:
        """Windows start .. start + count of the endless order, (count, T) int64."""
        places = (divmod(index, self.num_windows) for index in range(start, start + count))
        chosen = [self._order(epoch)[offset] for epoch, offset in places]
        offsets = torch.tensor(chosen, device=self.tokens.device)[:, None] * self.context_length
        return self.tokens[offsets + torch.arange(self.context_length, device=self.tokens.device)].long()

    def _order(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._epoch = epoch
            self._permutation = torch.randperm(self.num_windows, generator=generator).tolist()
        return self._permutation

    def spread(self, count: int) -> Tensor:
        """`count` windows spread evenly over the file, (count, T)."""
        chosen = torch.arange(count, device=self.tokens.device) * (self.num_windows // count)
        offsets = chosen[:, None] * self.context_length
        return self.tokens[offsets + torch.arange(self.context_length, device=self.tokens.device)].long()


class Run:
    """The training state of one arm and the clock, which stands still in evaluations and growths."""

    def __init__(self, arm: Arm, train: Windows, validation: Windows, device: str) -> None:
        self.arm, self.train, self.device = arm, train, device
        self.total_steps = max(arm.ends)
        growth = arm.growth_config()
        self.final_depth = planned_depth(growth, arm.n_layer)
        self.model = self._new_model()
        self.family = family_of(self.model)
        self.controller = GrowthController(
            growth,
            self.family,
            depth=arm.n_layer,
            total_steps=self.total_steps,
            seed=arm.seed,
            final_depth=self.final_depth,
        )
        self.validation = validation.spread(arm.eval_windows)
        self.probe = validation.spread(arm.probe_windows)
        self.step, self.windows_seen, self.flops, self.seconds = 0, 0, 0, 0.0
        self.batch_size = arm.small_batch_size or arm.batch_size
        self.rows: list[dict[str, Any]] = []
        self._open()

    def _new_model(self) -> PreTrainedModel:
        arm = self.arm
        model: Any = build_model(
            arm.arch,  # type: ignore[arg-type]
            n_layer=arm.n_layer,
            n_head=arm.n_head,
            n_embd=arm.n_embd,
            context_length=arm.context_length,
            vocab_size=arm.vocab_size,
            dropout=0.0,
            eos_token_id=0,
            final_depth=self.final_depth,
            seed=arm.seed,
        )
        return model.to(self.device)

    def _open(self) -> None:
        """The optimizer and the compiled blocks of the model as it is now."""
        arm = self.arm
        compile_blocks(self.model, self.family, cuda_graphs=arm.cuda_graphs and self.device == "cuda")
        self.optimizer: Any = build_optimizer(
            self.model,
            self.family.blocks,
            name=arm.optimizer,  # type: ignore[arg-type]
            lr=arm.lr,
            weight_decay=arm.weight_decay,
            betas=(0.9, 0.95),
        )
        depth = self.controller.depth
        self.flops_per_window = flops_per_token(self.model.config, arm.context_length) * arm.context_length
        self.peak = arm.lr * (self.final_depth / depth) ** arm.lr_depth_power

    def lr(self, end: int) -> float:
        """WSD: linear warm-up, constant, linear decay to 0 over the last `decay_fraction` of `end`."""
        arm, step = self.arm, self.step
        decay_steps = round(arm.decay_fraction * end)
        factor = min(1.0, (step + 1) / arm.lr_warmup_steps) * min(1.0, (end - step) / decay_steps)
        return self.peak * factor

    def train_step(self, end: int) -> None:
        rate = self.lr(end)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = self.train.take(self.windows_seen, self.batch_size)
        with torch.autocast(self.device, torch.bfloat16):
            loss = causal_loss(self.model, ids, ids, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.windows_seen += self.batch_size
        self.flops += self.flops_per_window * self.batch_size

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        losses = []
        for batch in windows.split(64):
            with torch.autocast(self.device, torch.bfloat16):
                losses.append(causal_loss(self.model, batch, batch, None) * len(batch))
        return float(torch.stack(losses).sum()) / len(windows)

    def grow(self, plan: Any) -> None:
        before = self.evaluate(self.probe)
        moments = capture_moments(self.model, self.optimizer)
        growth = grow_model(self.model, moments, self.controller, plan, self.step)
        self.model, self.batch_size = growth.model, self.arm.batch_size
        self._open()
        load_moments(self.model, self.optimizer, growth.migration.state.moments)
        config = self.controller.config
        if config.lr_policy != "unchanged":  # the hooks of an earlier growth went with its optimizer
            names = (name for name, _ in self.model.named_parameters())
            new = names_of_layers(names, self.family, plan.new_layers)
            Rewarm(self.model, [self.optimizer], new, config.lr_policy, config.rewarm_steps)
        self._note("growth", depth=plan.depth_after, before=before, after=self.evaluate(self.probe))

    def _note(self, kind: str, **facts: Any) -> None:
        row = {
            "kind": kind,
            "step": self.step,
            "flops": self.flops,
            "seconds": round(self.seconds, 2),
            **facts,
        }
        self.rows.append(row)
        print(json.dumps({"arm": self.arm.name, **row}), flush=True)

    def decay(self, end: int) -> None:
        """Decay a copy of the state to `end` and measure it; the run itself then goes on from here."""
        last = end == self.total_steps
        weights = None if last else {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        moments = None if last else copy.deepcopy(self.optimizer.state_dict())
        counters = (self.step, self.windows_seen, self.flops, self.seconds)
        for _ in self._timed(end, until=end):
            pass
        self._note("end", end=end, depth=self.controller.depth, loss=self.evaluate(self.validation))
        if weights is not None and moments is not None:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(moments)
            self.step, self.windows_seen, self.flops, self.seconds = counters

    def _timed(self, end: int, until: int) -> Iterator[int]:
        """Train to step `until` on the schedule of length `end`; yields with the clock stopped."""
        while self.step < until:
            stop = min(until, *(s for s in self._stops() if s > self.step))
            _synchronise(self.device)
            start = time.perf_counter()
            while self.step < stop:
                self.train_step(end)
                if end == self.total_steps and self.controller.wants_snapshot(self.step):
                    self.controller.snapshot(self.step, dict(self.model.named_parameters()))
            _synchronise(self.device)
            self.seconds += time.perf_counter() - start
            yield self.step

    def _stops(self) -> list[int]:
        due = self.controller.trigger_state.next_due_step
        interval = self.arm.eval_interval_steps
        following = (self.step // interval + 1) * interval
        return [following, *([due] if due is not None else [])]

    def execute(self) -> list[dict[str, Any]]:
        for end in sorted(self.arm.ends):
            begin_decay = end - round(self.arm.decay_fraction * end)
            for step in self._timed(self.total_steps, until=begin_decay):
                if self.controller.config.trigger == "never" or self.controller.depth == self.final_depth:
                    continue
                decision = self.controller.evaluate(step, self.evaluate(self.probe))
                measured = self.controller.last_metrics
                geometry = {k: measured.get(k) for k in ("tau_normalised", "kappa_normalised")}
                self._note("watch", **geometry, reason=decision.reason)
                if decision.plan is not None:
                    self.grow(decision.plan)
            self.decay(end)
        return self.rows


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def read_arms(path: Path) -> list[Arm]:
    content = json.loads(path.read_text())
    return [Arm(**_with_tuples({**content.get("base", {}), **arm})) for arm in content["arms"]]


def _with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def read_windows(path: Path, context_length: int, seed: int, device: str) -> Windows:
    tokens = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32))
    return Windows(tokens.to(device), context_length, seed)


def warm_up(arm: Arm, data: Path, device: str) -> None:
    """Compile what the arm needs before its clock runs: a few steps of a copy of it, growth included."""
    growth = {**arm.growth, "trigger": "fixed", "growth_fractions": (0.4,)} if arm.growth else {}
    short = replace(arm, name="warm-up", ends=(10,), growth=growth, eval_windows=64, probe_windows=64)
    train = read_windows(data / "val.bin", arm.context_length, 0, device)
    Run(short, train, train, device).execute()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--commit", default=None, help="where the tree is no git checkout")
    parser.add_argument("--budget_s", type=float, default=math.inf)
    arguments = parser.parse_args()
    worker, num_workers = map(int, arguments.worker.split("/"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    finished = [json.loads(line)["arm"] for line in _lines(arguments.out)]
    done = {(arm["name"], arm["seed"]) for arm in finished}
    started, warmed = time.monotonic(), set()
    for arm in read_arms(arguments.arms)[worker::num_workers]:
        if (arm.name, arm.seed) in done:
            continue
        if time.monotonic() - started > arguments.budget_s:
            print(f"no time left for {arm.name}", flush=True)
            continue
        shape = (arm.n_embd, arm.arch, arm.optimizer, arm.small_batch_size, bool(arm.growth))
        if shape not in warmed:
            warm_up(arm, arguments.data, device)
            warmed.add(shape)
        train = read_windows(arguments.data / "train.bin", arm.context_length, arm.seed, device)
        validation = read_windows(arguments.data / "val.bin", arm.context_length, 0, device)
        rows = Run(arm, train, validation, device).execute()
        gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        where = about(seeds=[arm.seed], commit=arguments.commit)
        result = {"arm": asdict(arm), "gpu": gpu, "torch": torch.__version__, **where, "rows": rows}
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
