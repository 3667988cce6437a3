"""Which layers cost least to convert, measured: each alone, by how far the model then is from what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiether.data import Progress
from aiether.data.prepare import silent
from aiether.evaluation import text_windows
from aiether.toroidal import ToroidalSettings, restore, retrofit, torus_terms

from .inputs import RetrofitJob, TextWindows, load_base, read_windows
from .losses import mean_divergence

SAMPLE = 8
"""Windows on which layers are compared."""


@dataclass(frozen=True)
class LayerCosts:
    """What each layer's conversion costs alone, untrained: KL from the model as it was, nats per token."""

    costs: tuple[float, ...]
    chosen: tuple[int, ...]

    def __str__(self) -> str:
        order = sorted(range(len(self.costs)), key=self.costs.__getitem__)
        rows = [f"{layer:5}  {self.costs[layer]:.5f}" for layer in order]
        chosen = " ".join(map(str, self.chosen))
        return "\n".join(["layer  divergence in nats per token", *rows, f"cheapest: --layers {chosen}"])


def compare_layers(job: RetrofitJob, progress: Progress | None = None) -> LayerCosts:
    """Convert every layer alone and see how far the model is then from what it was; nothing is written.

    Raises ValueError as `run_retrofit`.
    """
    say, model = progress or silent, load_base(job)
    return compare(job, model, read_windows(job, model, say), say)


def compare(job: RetrofitJob, model: Any, text: TextWindows, say: Progress) -> LayerCosts:
    """The same, of a model that is loaded already."""
    if job.suggest_layers is None:
        raise ValueError("no layers are named: give --layers, or --suggest_layers with how many to choose")
    step = max(1, len(text.train) // SAMPLE)
    sample = [ids[None] for ids, _ in text_windows(text.tokens, text.train[::step][:SAMPLE])]
    settings = replace(job.settings, backend="auto")  # without autocast, which tuning may have
    costs = layer_costs(model, sample, settings, lambda share: say("comparing layers", share))
    return LayerCosts(tuple(costs), tuple(cheapest(costs, job.suggest_layers)))


def layer_costs(
    model: Any,
    batches: Sequence[Tensor],
    settings: ToroidalSettings,
    report: Callable[[float], None] | None = None,
) -> list[float]:
    """KL(before || with this layer toroidal at its targets, untrained) of every layer, nats per token.

    The model is as before afterwards.

    Args:
        batches: int64 (B, T) each.
        report: told the share that is done.
    """
    training, device = model.training, model.device
    retrofit(model, layers=range(model.config.num_hidden_layers), settings=settings)
    try:
        terms = list(torus_terms(model.eval()))
        costs = [0.0] * len(terms)
        with torch.no_grad():
            for number, ids_BT in enumerate(batches):
                ids = ids_BT.to(device)
                before = model(input_ids=ids, use_cache=False).logits
                for layer, each in enumerate(terms):
                    each.set_progress(1.0)
                    now = model(input_ids=ids, use_cache=False).logits
                    each.set_progress(0.0)
                    costs[layer] += mean_divergence(before, now).item() / len(batches)
                    if report is not None:
                        report((number * len(terms) + layer + 1) / (len(batches) * len(terms)))
    finally:
        restore(model).train(training)
    return costs


def cheapest(costs: Sequence[float], count: int) -> list[int]:
    """The `count` layers that cost least, in the model's order.

    Raises
    ------
    ValueError
        If there are not as many.
    """
    if not 1 <= count <= len(costs):
        raise ValueError(f"{count} layers are asked for, of {len(costs)}: choose from 1 to {len(costs)}")
    return sorted(sorted(range(len(costs)), key=costs.__getitem__)[:count])
