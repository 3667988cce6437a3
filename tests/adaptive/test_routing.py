from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiether.adaptive import MixtureOfDepths, Routing, RoutingSettings, commit_routing
from aiether.adaptive.figures import compute_figures, reset_compute_figures
from aiether.adaptive.routing import Router

WIDTH = 8


class Block(nn.Module):
    """A residual block without attention, which notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.seen: list[Tensor] = []

    def forward(self, hidden_BKD: Tensor) -> Tensor:
        self.seen.append(hidden_BKD.detach())
        return hidden_BKD + self.linear(hidden_BKD).tanh()


def _mixture(router: Router, **settings: float | str) -> Any:
    torch.manual_seed(0)
    made = MixtureOfDepths(Block(), WIDTH, RoutingSettings(router=router, **settings))  # type: ignore[arg-type]
    if made.routing.settings.learned:
        nn.init.normal_(made.routing.weight)
    return made


def _changed(mixture: MixtureOfDepths, hidden: Tensor, present: Tensor | None = None) -> Tensor:
    """Which tokens were processed, bool (B, T)."""
    with torch.no_grad():
        return (mixture(hidden, present) != hidden).any(-1)


@pytest.mark.parametrize("predictor", ["router", "head"])
def test_router_and_predictor_learn_and_the_predictors_gradient_stops_at_its_weights(predictor: str) -> None:
    mixture = _mixture("topk", capacity=0.25, predictor=predictor)
    hidden = torch.randn(2, 16, WIDTH, requires_grad=True)
    mixture(hidden).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
    assert hidden.grad is not None
    with_predictor, by_router = hidden.grad.clone(), mixture.routing.weight.grad
    assert by_router is not None
    hidden.grad = None
    mixture.zero_grad()
    mixture.routing.auxiliary_scale = 0.0
    mixture(hidden).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, with_predictor)
    if predictor == "head":
        assert torch.equal(mixture.routing.weight.grad, by_router), (
            "a head of its own leaves the router alone"
        )
    else:
        assert not torch.equal(mixture.routing.weight.grad, by_router)


def test_a_control_has_nothing_to_learn_and_takes_changes_unweighted() -> None:
    hidden = torch.randn(2, 12, WIDTH)
    for router in ("random", "stride"):
        mixture = _mixture(router, capacity=0.5).eval()
        assert not list(mixture.routing.parameters())
        chosen = _changed(mixture, hidden)
        assert torch.allclose(mixture(hidden)[chosen], mixture.block(hidden)[chosen])


@pytest.mark.parametrize("router", ["topk", "random"])
def test_training_takes_exactly_its_share_of_each_rows_tokens(router: Router) -> None:
    mixture = _mixture(router, capacity=0.3).train()
    present = torch.ones(3, 20, dtype=torch.bool)
    present[1, :9] = False
    present[2, 3:] = False
    chosen = _changed(mixture, torch.randn(3, 20, WIDTH), present)
    assert chosen.sum(-1).tolist() == [6, 4, 1]  # ceil(0.3 * 20), ceil(0.3 * 11), ceil(0.3 * 3)
    assert not (chosen & ~present).any()
    assert mixture.block.seen[-1].shape[1] == 6, "places follow from the length alone"


def test_a_rows_top_k_does_not_depend_on_the_padding_beside_it() -> None:
    mixture = _mixture("topk", capacity=0.3).train()
    hidden, present = torch.randn(1, 12, WIDTH), torch.ones(1, 12, dtype=torch.bool)
    alone = _changed(mixture, hidden, present)
    padded = torch.cat([torch.randn(1, 7, WIDTH) * 50, hidden], 1)
    beside = _changed(mixture, padded, torch.cat([torch.zeros(1, 7, dtype=torch.bool), present], 1))
    assert torch.equal(beside[:, 7:], alone)


@pytest.mark.parametrize("capacity", [0.125, 0.3, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_stride_and_random_realise_their_capacity(capacity: float, training: bool) -> None:
    hidden = torch.randn(4, 500, WIDTH)
    by_stride = _changed(_mixture("stride", capacity=capacity).train(training), hidden)
    assert abs(by_stride.float().mean().item() - capacity) <= 1 / 500
    gaps = by_stride[0].nonzero().flatten().diff()
    assert gaps.max() - gaps.min() <= 1
    at_random = _changed(_mixture("random", capacity=capacity).train(training), hidden)
    assert abs(at_random.float().mean().item() - capacity) < 0.05
    assert training or capacity == 1 or not torch.equal(at_random, by_stride)


def test_random_routes_move_on_with_commit_only_and_are_equal_for_equal_passes() -> None:
    hidden = torch.randn(2, 40, WIDTH)
    one, other = (_mixture("random", capacity=0.25).train() for _ in range(2))
    first = _changed(one, hidden)
    assert torch.equal(_changed(one, hidden), first)
    assert torch.equal(_changed(other, hidden), first)
    assert not torch.equal(first[0], first[1]), "rows differ"
    commit_routing(one)
    assert not torch.equal(_changed(one, hidden), first)


def test_the_threshold_follows_drifting_scores_to_its_capacity() -> None:
    mixture = _mixture("threshold", capacity=0.25, threshold_momentum=0.8).train()
    torch.manual_seed(1)
    found = []
    for step in range(40):
        commit_routing(mixture)
        hidden = torch.randn(4, 200, WIDTH) * (1 + step / 20) + step / 10
        reset_compute_figures(mixture)
        mixture(hidden)
        found.append(compute_figures(mixture)["capacity"])
    assert abs(found[1] - 0.25) < 0.08, "one pass calibrates"
    assert all(abs(each - 0.25) < 0.1 for each in found[1:])
    assert abs(sum(found[-20:]) / 20 - 0.25) < 0.05


def test_the_threshold_is_not_moved_by_padding_evaluation_or_passes_without_gradient() -> None:
    mixture, hidden = _mixture("threshold", capacity=0.25).train(), torch.randn(2, 16, WIDTH)
    present = torch.ones(2, 16, dtype=torch.bool)
    present[1, 1:] = False  # a row of one token, fewer than the places there are
    mixture(hidden, present)
    commit_routing(mixture)
    calibrated = mixture.routing.threshold.clone()
    assert calibrated.isfinite()
    assert calibrated != 0
    mixture(hidden, torch.zeros_like(present))
    commit_routing(mixture)
    assert mixture.routing.threshold == calibrated
    with torch.no_grad():
        mixture(hidden * 9)
    mixture.eval()(hidden * 9)
    commit_routing(mixture)
    assert mixture.routing.threshold == calibrated


def test_a_causal_rule_does_not_see_what_comes_later() -> None:
    hidden = torch.randn(2, 30, WIDTH)
    changed = torch.cat([hidden[:, :17], torch.randn(2, 13, WIDTH)], 1)
    for router in ("topk", "threshold", "random", "stride"):
        mixture = _mixture(router, capacity=0.25, burst=1).eval()
        assert torch.equal(_changed(mixture, hidden)[:, :17], _changed(mixture, changed)[:, :17])
        assert torch.equal(_changed(mixture, hidden)[:, :17], _changed(mixture, hidden[:, :17]))
    training = _mixture("threshold", capacity=0.25, burst=1).train()
    assert torch.equal(_changed(training, hidden)[:, :17], _changed(training, changed)[:, :17])


@pytest.mark.parametrize("router", ["topk", "threshold"])
def test_a_capacity_of_one_leaves_no_token_out(router: Router) -> None:
    mixture, hidden = _mixture(router, capacity=1.0).train(), torch.randn(2, 30, WIDTH)
    for _ in range(3):
        mixture(hidden)
        commit_routing(mixture)
    assert _changed(mixture.eval(), hidden).all()


@pytest.mark.parametrize("predictor", ["router", "head"])
def test_a_trained_predictor_keeps_the_capacity(predictor: str) -> None:
    mixture = _mixture("topk", capacity=0.25, predictor=predictor).train()
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.02)
    torch.manual_seed(1)
    for _ in range(100):
        commit_routing(mixture)
        optimizer.zero_grad()
        mixture(torch.randn(4, 64, WIDTH)).square().mean().backward()
        optimizer.step()
    commit_routing(mixture)
    reset_compute_figures(mixture)
    mixture.eval()(torch.randn(16, 64, WIDTH))
    figures = compute_figures(mixture)
    assert abs(figures["capacity"] - 0.25) < 0.05
    assert figures["router_precision"] > 0.75
    assert figures["router_recall"] > 0.75


def test_figures_say_what_the_router_did() -> None:
    mixture = _mixture("topk", capacity=0.25, burst=1, slack=1.0).eval()
    with torch.no_grad():
        mixture.routing.threshold.fill_(-1e9)  # it wants every token
    hidden = torch.randn(2, 40, WIDTH)
    reset_compute_figures(mixture)
    mixture(hidden)
    figures = compute_figures(mixture)
    assert figures["capacity"] == 11 / 40
    assert figures["capacity_dropped"] == 1 - 11 / 40
    assert figures["router_precision"] == 0.25
    assert figures["router_recall"] == 1.0
    mixture.train()(hidden)
    assert int(mixture.routing.figures[0]) == 80, "counting ended"
    reset_compute_figures(mixture)
    mixture(hidden)
    assert compute_figures(mixture)["capacity"] == 0.25


def test_scores_are_float32_in_a_half_precision_pass() -> None:
    mixture = _mixture("topk", capacity=0.25).eval()
    hidden = torch.randn(2, 64, WIDTH)
    exact = (hidden * mixture.routing.weight).sum(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(mixture.routing.scores(hidden), exact, atol=1e-5)
        assert mixture(hidden).dtype == torch.float32
    half = mixture.to(torch.bfloat16)
    assert half.routing.scores(hidden.bfloat16()).dtype == torch.float32
    assert half(hidden.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity": 0.0},
        {"capacity": 1.5},
        {"router": "best"},
        {"predictor": "oracle"},
        {"slack": 0.5},
        {"burst": 0},
        {"threshold_momentum": 1.0},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, float | str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RoutingSettings(**wrong)  # type: ignore[arg-type]


def test_the_router_of_a_block_is_found_under_its_own_name() -> None:
    names = {name for name, _ in _mixture("topk").named_parameters()}
    assert {"routing.weight", "routing.bias"} <= names
    assert not list(Routing(WIDTH, RoutingSettings(router="stride")).parameters())


def test_the_last_pass_of_training_counts_too() -> None:
    """Without another pass after it, the threshold was what it had been before."""
    routing = Routing(16, RoutingSettings(capacity=0.25)).train()
    hidden = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    routing(lambda chosen: chosen, hidden.requires_grad_())
    assert routing.threshold == 0
    routing.eval()
    assert routing.threshold == routing.next_threshold != 0
    assert routing.followed == 1
    routing.train().commit()
    assert routing.followed == 1, "and once"
