from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aiether.training.muon import BatchedMuon
from aiether.training.optimizer import MuonAdamW, build_optimizer


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
        return self.norm(hidden)

    def matrices(self) -> list[nn.Parameter]:
        return [block.get_parameter("weight") for block in self.blocks]


def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def build(net: nn.Module, name: str, lr: float = 1e-2) -> torch.optim.Optimizer:
    return build_optimizer(net, "blocks", name=name, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))  # type: ignore[arg-type]


def backward(net: nn.Module) -> None:
    net(torch.arange(7)).pow(2).mul(torch.arange(28.0).view(7, 4)).mean().backward()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_tensor_is_in_one_group_and_only_matrices_decay(name: str) -> None:
    net = model()
    optimizer = build(net, name)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.ndim >= 2)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    net = model()
    optimizer = build(net, "muon")
    by_muon = {id(p) for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]}
    assert by_muon == set(map(id, net.matrices()))


def test_the_combined_optimizer_steps_as_its_two_parts_do_alone() -> None:
    combined, apart = model(), model()
    optimizer = build(combined, "muon")
    matrices = apart.matrices()
    rest = [p for p in apart.parameters() if not any(p is m for m in matrices)]
    alone = [
        BatchedMuon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]
    for _ in range(3):
        for net, optimizers in ((combined, [optimizer]), (apart, alone)):
            backward(net)
            for o in optimizers:
                o.step()
                o.zero_grad()
    for a, b in zip(combined.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_survives_load_state_dict_and_continues_equally() -> None:
    first, second = model(), model()
    one, two = build(first, "muon"), build(second, "muon")
    backward(first)
    one.step()
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # torch shares tensors otherwise
    for net, optimizer in ((first, one), (second, two)):
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(two, MuonAdamW)
    assert len(two.state) == len(list(second.parameters()))


def test_a_scheduler_drives_both_parts() -> None:
    net = model()
    optimizer = build(net, "muon", lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    backward(net)
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_frozen_tensors_stay_untouched() -> None:
    net = model()
    optimizer = build(net, "muon")
    frozen, free = net.matrices()
    frozen.requires_grad_(False)
    before, free_before = frozen.clone(), free.detach().clone()
    backward(net)
    optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(free, free_before)
