from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aiether.adaptive import LatentReasoning, LatentSettings, exit_probabilities, prior_probabilities
from aiether.adaptive.halting import bernoulli_kl, conditional_stops, thinking_rows
from aiether.adaptive.latent import weighted_surrogate

WIDTH, ITERATIONS = 6, 4
STOPS = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=7)


def expected_divergence(stop_logits_N1: Tensor, prior: Tensor) -> Tensor:
    """KL(p || prior) of the exit in closed form, from the N - 1 logits along the last dimension."""
    stops = F.pad(torch.sigmoid(stop_logits_N1), (0, 1), value=1.0)
    reached = torch.cat([torch.ones_like(stops[..., :1]), (1 - stops[..., :-1]).cumprod(-1)], dim=-1)[
        ..., :-1
    ]
    return (reached * bernoulli_kl(stop_logits_N1, conditional_stops(prior)[:-1])).sum(-1)


@given(STOPS)
def test_exits_by_their_definition_and_back(stops: list[float]) -> None:
    found = exit_probabilities(torch.tensor(stops, dtype=torch.float64))
    left, expected = 1.0, []
    for stop in [*stops[:-1], 1.0]:
        expected.append(left * stop)
        left *= 1 - stop
    assert found.tolist() == pytest.approx(expected, abs=1e-15)
    assert found.sum().item() == pytest.approx(1)
    back = conditional_stops(found)
    assert back[:-1].tolist() == pytest.approx(stops[:-1], rel=1e-9)
    assert back[-1].item() == pytest.approx(1)


def test_priors() -> None:
    assert prior_probabilities("uniform", 4).tolist() == [0.25] * 4
    assert prior_probabilities("geometric", 3, 0.2).tolist() == pytest.approx([0.2, 0.16, 0.64])
    for wrong in ({"prior": "poisson"}, {"prior": "geometric", "rate": 1.0}):
        with pytest.raises(ValueError, match=r"poisson|rate"):
            prior_probabilities(num_iterations=3, **wrong)  # type: ignore[arg-type]


@given(st.floats(-80, 80), st.floats(0.05, 0.95))
def test_the_divergence_of_a_decision_is_finite_and_right(logit: float, prior: float) -> None:
    found = bernoulli_kl(torch.tensor(logit, dtype=torch.float64), prior)
    assert found.isfinite()
    assert found >= -1e-12
    stop = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
    if 1e-9 < stop < 1 - 1e-9:
        p, q = (torch.distributions.Bernoulli(torch.as_tensor(x, dtype=torch.float64)) for x in (stop, prior))
        assert found.item() == pytest.approx(
            torch.distributions.kl_divergence(p, q).item(), rel=1e-5, abs=1e-9
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=5))
def test_decision_by_decision_the_divergence_is_that_of_the_exits(logits: list[float]) -> None:
    logit = torch.tensor(logits, dtype=torch.float64)
    prior = exit_probabilities(torch.full((len(logits) + 1,), 0.3, dtype=torch.float64))
    exits = exit_probabilities(torch.cat([torch.sigmoid(logit), torch.ones(1, dtype=torch.float64)]))
    direct = (exits * (exits / prior).log()).sum()
    assert expected_divergence(logit, prior).item() == pytest.approx(direct.item(), abs=1e-9)


class TokenBlock(nn.Module):
    """A block without attention: every token's exits can be enumerated."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_BTD: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_BTD + self.linear(hidden_BTD).tanh(), None


def _latent(**settings: Any) -> LatentReasoning:
    torch.manual_seed(0)
    made = LatentReasoning(TokenBlock(), WIDTH, LatentSettings(iterations=ITERATIONS, **settings))
    for parameter in made.parameters(recurse=False):
        nn.init.normal_(parameter, std=0.4)
    return made.double()


def _repeated(count: int) -> tuple[Tensor, Tensor]:
    """One token, in many rows: each draws an exit of its own."""
    torch.manual_seed(3)
    return torch.randn(1, 1, WIDTH, dtype=torch.float64).expand(count, -1, -1), torch.zeros(
        1, 1, dtype=torch.long
    )


def _exact(latent: LatentReasoning) -> tuple[Tensor, Tensor, Tensor]:
    """Of that token: the states of all exits (N, D), the logits of stopping (N - 1), p (N)."""
    hidden, places = _repeated(1)
    exits = latent(hidden, places_BT=places, all_exits=True).exits_NBTD
    logits = torch.stack([latent.stop_logit(n, exits[n]) for n in range(ITERATIONS - 1)])[:, 0, 0].double()
    return exits[:, 0, 0], logits, exit_probabilities(torch.cat([torch.sigmoid(logits), logits.new_ones(1)]))


@pytest.mark.parametrize("prior", ["uniform", "geometric"])
def test_sampled_exits_estimate_the_expectation_over_all_exits(prior: str) -> None:
    latent, samples = _latent(prior=prior, prior_rate=0.3).train(), 60_000
    hidden, places = _repeated(samples)
    with torch.no_grad():
        thought = latent(hidden, places_BT=places)
        states, _, exits = _exact(latent)
    taken, weights = thought.iterations_BT[:, 0], thought.weights_BT
    assert weights is not None
    assert weights.mean().item() == pytest.approx(1, abs=0.01)
    shares = [rows / samples for rows in latent.settings.training_rows(samples)]
    assert weights.max() <= 2 / shares[-1] + 1e-5, "half of the draws are p's own"
    mixed = (exits + prior_probabilities(prior, ITERATIONS, 0.3)) / 2  # type: ignore[arg-type]
    reached = torch.ones(())
    for n in range(ITERATIONS):
        drawn = (taken == n + 1).double()
        assert (drawn * weights[:, 0]).mean().item() == pytest.approx(exits[n].item(), abs=0.012)
        go_on = mixed[n + 1 :].sum() / mixed[n:].sum()
        if n + 1 < ITERATIONS:
            go_on = go_on.clamp_max(shares[n + 1] / shares[n])
        expected, reached = reached * (1 - go_on), reached * go_on
        assert drawn.mean().item() == pytest.approx(expected.item(), abs=0.012)
        if drawn.any():
            assert torch.allclose(thought.hidden_BTD[taken == n + 1][:, 0], states[n])


def test_fewer_and_fewer_rows_think_on_and_a_row_alone_always_does() -> None:
    assert thinking_rows("uniform", 4, 64) == [64, 64, 39, 39]
    assert thinking_rows("uniform", 4, 1) == [1, 1, 1, 1]
    assert thinking_rows("geometric", 3, 10, rate=0.5) == [10, 10, 4]
    latent = _latent().train()
    hidden, places = torch.randn(8, 5, WIDTH, dtype=torch.float64), torch.arange(5)[None]
    runs: list[int] = []
    latent.block.register_forward_hook(lambda _, args, __: runs.append(len(args[0])))
    thought = latent(hidden, places_BT=places)
    assert runs == latent.settings.training_rows(8) == [8, 8, 5, 5]
    assert (thought.iterations_BT[5:] <= 2).all()
    assert (thought.iterations_BT[:5] > 2).any()
    assert thought.hidden_BTD.shape == hidden.shape
    runs.clear()
    latent.eval()(hidden, places_BT=places)
    assert set(runs) == {8}, "in use every row thinks as long as its tokens want"


def _loss(states: Tensor) -> Tensor:
    return (states * torch.linspace(-1, 1, WIDTH, dtype=torch.float64)).sum(-1).square()


def test_gradients_of_sampled_exits_average_to_those_of_the_expected_loss() -> None:
    latent, samples = _latent(kl_weight=0.0).train(), 60_000
    states, _, exits = _exact(latent)
    (exits * _loss(states)).sum().backward()
    exact = {name: p.grad.clone() for name, p in latent.named_parameters() if p.grad is not None}
    latent.zero_grad()
    hidden, places = _repeated(samples)
    thought = latent(hidden, places_BT=places)
    assert thought.weights_BT is not None
    losses, ones = _loss(thought.hidden_BTD)[:, 0], torch.ones(samples, dtype=torch.float64)
    (weighted_surrogate(losses, thought.weights_BT[:, 0].double(), ones) / samples).backward()
    for name, parameter in latent.named_parameters():
        assert parameter.grad is not None
        scale = exact[name].abs().max()
        assert torch.allclose(parameter.grad, exact[name], atol=0.03 * scale.item() + 1e-3), name
    assert exact["halt_bias"].abs().max() > 0.02, "the head has something to learn here"


def test_the_gradient_of_few_tokens_is_not_biased_by_their_own_losses() -> None:
    weights, losses = torch.tensor([1.0, 1.0], requires_grad=True), torch.tensor([3.0, 1.0])
    weighted_surrogate(losses, weights, torch.ones(2)).backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [3.0 - 1.0, 1.0 - 3.0]
    alone = torch.ones(1, requires_grad=True)
    weighted_surrogate(torch.tensor([3.0]), alone, torch.ones(1)).backward()
    assert alone.grad is not None
    assert alone.grad.tolist() == [3.0]
    nothing = weighted_surrogate(losses, weights, torch.zeros(2))
    assert nothing == 0


def test_the_divergence_reaches_the_head_through_any_loss() -> None:
    latent, samples = _latent(kl_weight=0.5).train(), 60_000
    _, logits, _ = _exact(latent)
    (0.5 * expected_divergence(logits, prior_probabilities("uniform", ITERATIONS).double())).backward()
    assert latent.halt_bias.grad is not None
    exact, latent.halt_bias.grad = latent.halt_bias.grad.clone(), None
    latent.auxiliary_scale = 1.0
    hidden, places = _repeated(samples)
    (latent(hidden, places_BT=places).hidden_BTD * 0).sum().backward()
    assert latent.halt_bias.grad is not None
    assert torch.allclose(latent.halt_bias.grad, exact, atol=0.02 * exact.abs().max().item() + 1e-3)


def test_an_untrained_head_draws_from_the_prior() -> None:
    latent = LatentReasoning(TokenBlock(), WIDTH, LatentSettings(iterations=ITERATIONS, prior="geometric"))
    hidden, places = _repeated(1)
    exits = latent(hidden.float(), places_BT=places, all_exits=True).exits_NBTD
    stops = [torch.sigmoid(latent.stop_logit(n, exits[n]))[0, 0] for n in range(ITERATIONS - 1)]
    found = exit_probabilities(torch.stack([*stops, torch.ones(())]))
    assert torch.allclose(found, prior_probabilities("geometric", ITERATIONS), atol=1e-6)
