"""Batched Muon against torch.optim.Muon and a float64 orthogonalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aiether.training import muon
from aiether.training.muon import BatchedMuon, orthogonalise

SHAPES = [(8, 8), (8, 32), (32, 8), (8, 32), (16, 24), (1, 8)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def step_with(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_steps_as_torch_does_up_to_the_rounding_of_bfloat16(adjust_lr_fn: str, nesterov: bool) -> None:
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    ours, theirs = matrices(), matrices()
    batched, plain = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    before = copy.deepcopy(ours)
    for seed in range(3):
        step_with(batched, ours, seed)
        step_with(plain, theirs, seed)
    for start, mine, reference in zip(before, ours, theirs, strict=True):
        moved = (reference - start).norm()
        assert (mine - reference).norm() < 0.02 * moved
        assert torch.equal(batched.state[mine]["momentum_buffer"], plain.state[reference]["momentum_buffer"])


def test_the_iteration_keeps_singular_vectors_and_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(4, 16, 48, generator=generator, dtype=torch.float64)
    result = orthogonalise(stack, coefficients=COEFFICIENTS, steps=5, eps=1e-7)
    for matrix, direction in zip(stack, result, strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        core = u.T @ direction @ vh.T
        off_diagonal = core - torch.diag(core.diagonal())
        assert off_diagonal.abs().max() < 1e-10
        assert core.diagonal().min() > 0.6
        assert core.diagonal().max() < 1.3


def test_a_bounded_batch_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, split = matrices(), matrices()
    first = BatchedMuon(whole, lr=0.02, adjust_lr_fn="match_rms_adamw")
    step_with(first, whole, 0)
    monkeypatch.setattr(muon, "_MAX_BATCH_ELEMENTS", 256)
    second = BatchedMuon(split, lr=0.02, adjust_lr_fn="match_rms_adamw")
    step_with(second, split, 0)
    for a, b in zip(whole, split, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_a_matrix_without_gradient_keeps_its_value() -> None:
    parameters = matrices()
    optimizer = BatchedMuon(parameters, lr=0.02, adjust_lr_fn="match_rms_adamw")
    idle = parameters[1].detach().clone()
    for parameter in parameters[:1] + parameters[2:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[1], idle)
    assert parameters[1] not in optimizer.state
