"""AdamW, and Muon beside AdamW as one optimizer object."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .muon import BatchedMuon

OptimizerName = Literal["adamw", "muon"]

LATENT_BLOCK, MEMORY_TABLE = "model.latent.block.", "memory.values.weight"
"""Where a LAHR model's latent block and its memory's table are in parameter names."""


class MuonAdamW(Optimizer):
    """Muon on some groups, torch.optim.AdamW on the others, behind one Optimizer interface.

    Groups carry `algorithm` ("muon" or "adamw"). The two inner optimizers borrow this one's groups and state
    (the same objects), so that schedulers, `load_state_dict` and name-keyed state see one optimizer.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__([_with_defaults(group) for group in groups], defaults={})
        self._link()

    def _link(self) -> None:
        self._inner: list[Optimizer] = []
        for algorithm, cls in (("muon", BatchedMuon), ("adamw", AdamW)):
            groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if groups:
                inner = cls([nn.Parameter(torch.zeros(1, 1))])
                inner.param_groups, inner.state = groups, self.state
                self._inner.append(inner)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces groups and state: lend the new ones out
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner:
            inner.step()
        return loss


def _with_defaults(group: dict[str, Any]) -> dict[str, Any]:
    """Fill a group with every setting that its algorithm's kernel reads, taken from torch's own defaults."""
    cls = {"muon": BatchedMuon, "adamw": AdamW}[group["algorithm"]]
    defaults = cls([nn.Parameter(torch.zeros(1, 1))]).defaults
    return {**defaults, **group}


def build_optimizer(
    model: nn.Module,
    blocks: str,
    *,
    name: OptimizerName,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    table_lr: float = 1.0,
) -> Optimizer:
    """The optimizer of a run over the model's trainable tensors.

    Matrices decay, vectors (biases, norms) do not. With `muon`, the matrices under the module path `blocks`
    are orthogonalised, with a step of AdamW's root mean square, so that one learning rate serves both;
    embeddings, head and vectors stay with AdamW. So are those of a latent block, which is a block like them.
    The table of a product-key memory has the learning rate `lr * table_lr`, and does not decay: each step
    touches few of its rows.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    places = (f"{blocks}.", LATENT_BLOCK)
    in_muon = {n for n, p in trainable.items() if name == "muon" and p.ndim == 2 and n.startswith(places)}
    tables = {n for n in trainable if n.endswith(MEMORY_TABLE)}
    adamw = {"algorithm": "adamw", "lr": lr, "betas": betas, "fused": _fused(trainable.values())}
    groups = [
        {**adamw, "params": _pick(trainable, in_muon | tables, matrices=True), "weight_decay": weight_decay},
        {**adamw, "params": _pick(trainable, in_muon | tables, matrices=False), "weight_decay": 0.0},
    ]
    if tables:
        rows = [trainable[n] for n in trainable if n in tables]
        groups.append({**adamw, "params": rows, "lr": lr * table_lr, "weight_decay": 0.0})
    if name == "adamw":
        return AdamW([{k: v for k, v in group.items() if k != "algorithm"} for group in groups])
    muon = {"algorithm": "muon", "lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return MuonAdamW([{**muon, "params": [trainable[n] for n in trainable if n in in_muon]}, *groups])


def _pick(trainable: dict[str, nn.Parameter], taken: set[str], *, matrices: bool) -> list[nn.Parameter]:
    return [p for n, p in trainable.items() if n not in taken and (p.ndim >= 2) == matrices]


def _fused(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters)
