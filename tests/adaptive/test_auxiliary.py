from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aiether.adaptive import MixtureOfDepths, RoutingSettings, attach_loss, set_auxiliary_scale


def test_an_attached_loss_changes_no_value_and_adds_its_gradient() -> None:
    weight, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    carrier = weight * 2
    carried = attach_loss(carrier, (other * weight).sum())
    assert torch.equal(carried, carrier)
    (carried.sum() * 10).backward()  # whatever the factor of the loss that is reported
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 20 + other)
    assert torch.allclose(other.grad, weight)  # type: ignore[arg-type]


def test_a_carrier_without_gradient_carries_too() -> None:
    weight = torch.ones(2, requires_grad=True)
    (attach_loss(torch.zeros(2), weight.sum() * 3) * torch.ones(2)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_counts_once_under_checkpointing(reentrant: bool) -> None:
    weight, hidden = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)

    def layer(values: torch.Tensor) -> torch.Tensor:
        return attach_loss(values * weight, (weight**2).sum())

    checkpoint(layer, hidden, use_reentrant=reentrant).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, hidden.detach() + 2 * weight.detach())


def test_accumulated_parts_of_a_batch_give_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    model = MixtureOfDepths(torch.nn.Linear(4, 4), 4, RoutingSettings(capacity=0.5, predictor="head"))
    batch = torch.randn(4, 6, 4)
    model(batch).square().mean().backward()
    whole = model.routing.predictor_weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    set_auxiliary_scale(model, 0.5)
    for part in batch.chunk(2):
        (model(part).square().mean() / 2).backward()
    assert torch.allclose(model.routing.predictor_weight.grad, whole, atol=1e-6)  # type: ignore[arg-type]
