"""Latent reasoning: a block that each token runs through again until it has thought enough.

Iteration n computes h_n = block(h_(n-1) + inject * h_0 + step_n): the input is seen again at every iteration,
and each knows its number. Tokens attend to each other at the same iteration; one that has stopped is seen as
it was at its last. So a thought sees the whole context up to its token, and never a later one.

Training samples one exit for each token, so that the output head is computed once, and weighs its loss with
p_n / q_n: the mean is the expected loss over the halting distribution p, whose gradient reaches the halting
head. The sampling distribution q is half p, half the prior. Not all rows of a batch run all iterations
(`thinking_rows`): what would be computed for tokens that have stopped is mostly saved. The divergence from
the prior (PonderNet's, decision by decision) is added to the gradient. Outside training a token stops when
the probability to have stopped exceeds q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .auxiliary import attach_loss
from .halting import Prior, bernoulli_kl, conditional_stops, prior_probabilities, thinking_rows
from .randomness import hashed_uniform

Halting = Literal["learned", "fixed", "random", "change"]
KeyValues = tuple[Tensor, Tensor]
"""Keys and values, (B, heads, T, head_dim) each."""
Store = Callable[[int, KeyValues], KeyValues]
"""store(iteration, new keys and values) keeps them behind those of earlier tokens and returns all."""

_SALT = 1_000_000
"""Beyond any layer's index."""


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """How long tokens are thought about.

    Attributes
    ----------
    iterations: the most that a token gets, N.
    halting: `learned`; or a control: `fixed` (always N), `random` (an exit drawn from the prior), `change`
        (stops when an iteration changed the state by less than `change_threshold`, relatively).
    halt_q: a token stops at the first iteration at which it has stopped with at least this probability. 0:
        after one iteration; 1: after all.
    prior, prior_rate, kl_weight: what the exit's distribution is drawn towards, and how strongly.
    """

    iterations: int = 4
    halting: Halting = "learned"
    halt_q: float = 0.5
    prior: Prior = "uniform"
    prior_rate: float = 0.2
    kl_weight: float = 0.01
    change_threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}: it must be at least 1")
        if self.halting not in get_args(Halting):
            raise ValueError(f"halting is {self.halting!r}: choose one of {', '.join(get_args(Halting))}")
        if not 0 <= self.halt_q <= 1:
            raise ValueError(f"halt_q is {self.halt_q}: a probability from 0 to 1 is meant")
        if self.kl_weight < 0 or self.change_threshold < 0:
            raise ValueError(
                f"kl_weight {self.kl_weight} and change_threshold {self.change_threshold} must be 0 or more"
            )
        prior_probabilities(self.prior, self.iterations, self.prior_rate)  # raises for what it cannot be

    @property
    def learns(self) -> bool:
        """Whether there is a decision, and a head that takes it."""
        return self.halting == "learned" and self.iterations > 1

    def training_rows(self, batch_size: int) -> list[int]:
        """How many rows run each iteration in training: a row's place, never its content, decides."""
        if not self.learns:
            return [batch_size] * self.iterations
        return thinking_rows(self.prior, self.iterations, batch_size, self.prior_rate)


@dataclass(frozen=True)
class Thought:
    """What came of thinking.

    Attributes
    ----------
    hidden_BTD: each token's state at its exit.
    iterations_BT: int64, how many iterations it took.
    weights_BT: float32, p / q of the sampled exit, through which the halting head learns; None outside
        training and where nothing is learned.
    exits_NBTD: the states after each iteration, where they were asked for.
    """

    hidden_BTD: Tensor
    iterations_BT: Tensor
    weights_BT: Tensor | None
    exits_NBTD: Tensor | None = None


class LatentReasoning(nn.Module):
    """A block applied up to N times a token, with per-token halting.

    Args:
        block: f(hidden_BTD, *, earlier, active_BT, store, **kwargs) -> (hidden_BTD, keys and values or None),
            causal, residual connection included. Its attention passes its keys and values through
            `keep_stopped`, and `store`, if there is one, before it attends; it returns what `keep_stopped`
            gave. A block without attention returns None.
    """

    passes: Tensor
    figures: Tensor

    def __init__(self, block: nn.Module, hidden_size: int, settings: LatentSettings) -> None:
        super().__init__()
        self.block, self.settings = block, settings
        self.auxiliary_scale = 1.0
        self.counting = False
        with torch.device("cpu"):  # a model is first built without memory when it is loaded
            prior = prior_probabilities(settings.prior, settings.iterations, settings.prior_rate)
        self.prior_stops: list[float] = conditional_stops(prior).tolist()
        self.steps = nn.Parameter(torch.empty(settings.iterations, hidden_size))
        self.inject = nn.Parameter(torch.empty(hidden_size))
        if settings.learns:
            self.halt_weight = nn.Parameter(torch.empty(hidden_size))
            self.halt_bias = nn.Parameter(torch.empty(settings.iterations - 1))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer(
            "figures", torch.zeros(2, dtype=torch.long), persistent=False
        )  # tokens, iterations
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights, the block's aside: no iteration differs from another, nothing is counted."""
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            nn.init.zeros_(tensor)

    def commit(self) -> None:
        """Between two training passes: the next random numbers."""
        self.passes.add_(1)

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        places_BT: Tensor,
        present_BT: Tensor | None = None,
        store: Store | None = None,
        all_exits: bool = False,
        **kwargs: Any,
    ) -> Thought:
        """(B, T, D) -> the states at each token's exit.

        Args:
            places_BT: int64, where each token stands in its row: numbers are drawn by it.
            present_BT: bool, False for padding, which is not counted.
            store: where earlier tokens' keys and values are; None: nothing came before.
            all_exits: nobody stops, and the states after each iteration are returned.
            kwargs: for the block.
        """
        run = _Run(self, hidden_BTD, places_BT, present_BT, store, all_exits)
        state = hidden_BTD
        for number in range(self.settings.iterations):
            if number and run.all_stopped():
                run.fill(number)
                break
            state = run.narrow(number, state)
            proposed, run.last = self.block(
                state + self.inject * hidden_BTD[: len(state)] + self.steps[number],
                earlier=run.last,
                active_BT=run.active_BT,
                store=None if store is None else partial(store, number),
                **{name: _of_rows(value, len(state)) for name, value in kwargs.items()},
            )
            state = run.advance(number, state, proposed)
            if run.exits is not None:
                run.exits.append(state)
        state = run.widen(state)
        if self.counting:
            present = torch.ones_like(run.taken_BT) if present_BT is None else present_BT.long()
            self.figures += torch.stack([present.sum(), (run.taken_BT * present).sum()])
        exits = None if run.exits is None else torch.stack(run.exits)
        return Thought(run.carry(state), run.taken_BT, run.weights_BT, exits)

    def stop_logit(self, number: int, state_BTD: Tensor) -> Tensor:
        """The logit of stopping after iteration `number` (from 0, not the last), float32 (B, T).

        The head reads the state at length 1, and what it says is added to the prior's logit. At a greater
        length one step of an optimizer turns every token's decision, and the loss of the whole model suffers.
        """
        prior = self.prior_stops[number]
        state_BTD = F.normalize(state_BTD.float(), dim=-1)
        said_BT = (state_BTD * self.halt_weight.float()).sum(-1) + self.halt_bias[number].float()
        return said_BT + math.log(prior / (1 - prior))


def _of_rows(value: Any, num_rows: int) -> Any:
    """A block's argument for the first rows; what has one row counts for every one."""
    if isinstance(value, tuple):
        return tuple(_of_rows(each, num_rows) for each in value)
    return value[:num_rows] if isinstance(value, Tensor) and len(value) > num_rows else value


def keep_stopped(own: KeyValues, earlier: KeyValues | None, active_BT: Tensor) -> KeyValues:
    """An iteration's keys and values: stopped tokens keep those of their last one."""
    if earlier is None:
        return own
    active = active_BT[:, None, :, None]
    return torch.where(active, own[0], earlier[0]), torch.where(active, own[1], earlier[1])


class _Run:
    """One pass: which tokens are still thinking, and what the sampled exits weigh."""

    def __init__(
        self,
        latent: LatentReasoning,
        hidden_BTD: Tensor,
        places_BT: Tensor,
        present_BT: Tensor | None,
        store: Store | None,
        all_exits: bool,
    ) -> None:
        self.latent, self.settings, self.store = latent, latent.settings, store
        self.places_BT, self.present_BT = places_BT.expand(hidden_BTD.shape[:2]), present_BT
        shape, device = hidden_BTD.shape[:2], hidden_BTD.device
        self.active_BT = torch.ones(shape, dtype=torch.bool, device=device)
        self.taken_BT = torch.zeros(shape, dtype=torch.long, device=device)
        self.exits: list[Tensor] | None = [] if all_exits else None
        self.training = latent.training and self.settings.halting != "fixed" and not all_exits
        self.last: KeyValues | None = None
        ones = torch.ones(shape, dtype=torch.float32, device=device)
        # The chance to get here under p, as sampled, and under half p and half the prior.
        self.reached_p_BT, self.reached_q_BT, self.reached_mixed_BT = ones, ones, ones
        self.weights_BT: Tensor | None = ones if self.training and latent.settings.learns else None
        self.divergence_BT: Tensor | None = None
        self.rows: list[int] | None = self.settings.training_rows(len(hidden_BTD)) if self.training else None
        self.ended: list[tuple[Tensor, ...]] = []

    def narrow(self, number: int, state_BTD: Tensor) -> Tensor:
        """Leave aside the rows that do not run iteration `number`."""
        if self.rows is None or (count := self.rows[number]) == len(state_BTD):
            return state_BTD
        assert self.weights_BT is not None  # rows end only where exits are sampled
        assert self.divergence_BT is not None
        kept = (state_BTD, self.taken_BT, self.weights_BT, self.divergence_BT)
        self.ended.append(tuple(each[count:] for each in kept))
        state_BTD, self.taken_BT, self.weights_BT, self.divergence_BT = (each[:count] for each in kept)
        self.active_BT, self.places_BT = self.active_BT[:count], self.places_BT[:count]
        self.reached_p_BT, self.reached_q_BT = self.reached_p_BT[:count], self.reached_q_BT[:count]
        self.reached_mixed_BT = self.reached_mixed_BT[:count]
        if self.last is not None:
            self.last = (self.last[0][:count], self.last[1][:count])
        return state_BTD

    def widen(self, state_BTD: Tensor) -> Tensor:
        """All rows again, in their order."""
        for rows in reversed(self.ended):
            assert self.weights_BT is not None
            assert self.divergence_BT is not None
            kept = (state_BTD, self.taken_BT, self.weights_BT, self.divergence_BT)
            both = (torch.cat(each) for each in zip(kept, rows, strict=True))
            state_BTD, self.taken_BT, self.weights_BT, self.divergence_BT = both
        return state_BTD

    def all_stopped(self) -> bool:
        """Whether nothing is left to do; asked outside training and compiled code: it waits for a device."""
        if self.latent.training or self.settings.halting == "fixed" or torch.compiler.is_compiling():
            return False
        if self.active_BT.device.type == "meta":
            return False
        active_BT = self.active_BT if self.present_BT is None else self.active_BT & self.present_BT
        return not bool(active_BT.any())

    def fill(self, number: int) -> None:
        """Later tokens may think longer than these: the deeper iterations get these ones' last keys."""
        if self.store is not None and self.last is not None:
            for deeper in range(number, self.settings.iterations):
                self.store(deeper, self.last)

    def advance(self, number: int, state_BTD: Tensor, proposed_BTD: Tensor) -> Tensor:
        """The state after an iteration: stopped tokens keep theirs; then some stop."""
        state = torch.where(self.active_BT[..., None], proposed_BTD, state_BTD) if number else proposed_BTD
        self.taken_BT = self.taken_BT + self.active_BT
        if number < self.settings.iterations - 1:
            stops_BT = self._stops(number, state_BTD, state)
            self.active_BT = self.active_BT & ~stops_BT
        return state

    def _stops(self, number: int, before_BTD: Tensor, state_BTD: Tensor) -> Tensor:
        settings, prior = self.settings, self.latent.prior_stops[number]
        if self.exits is not None or settings.halting == "fixed":
            return torch.zeros_like(self.active_BT)
        if settings.halting == "change" and not self.training:
            moved = (state_BTD - before_BTD).float().norm(dim=-1)
            return moved < settings.change_threshold * before_BTD.float().norm(dim=-1)
        if not settings.learns:  # random, and `change` in training: exits drawn from the prior
            count = self.latent.passes if self.training else None
            return hashed_uniform(self.places_BT, _SALT + number, count) < prior
        logit_BT = self.latent.stop_logit(number, state_BTD)
        stop_p_BT = torch.sigmoid(logit_BT)
        if not self.training:
            if settings.halt_q >= 1:  # a sigmoid may round to 1
                return torch.zeros_like(self.active_BT)
            self.reached_p_BT = self.reached_p_BT * (1 - stop_p_BT)
            return 1 - self.reached_p_BT >= settings.halt_q
        return self._sampled(number, logit_BT, stop_p_BT, prior)

    def _sampled(self, number: int, logit_BT: Tensor, stop_p_BT: Tensor, prior: float) -> Tensor:
        """An exit drawn from q, about (p + prior) / 2; its weight p / q; its share of the divergence.

        The mixture: having come here under it, it is p's path with probability reached_p / (2 reached_mixed).
        q goes on as often as the mixture, or as the rows do where these are fewer; since some rows end, the
        tokens of the others go on more often, so that over all rows it is q.
        """
        assert self.rows is not None
        going_rows = self.rows[number + 1] / self.rows[number]
        with torch.no_grad():
            reached_prior = 2 * self.reached_mixed_BT - self.reached_p_BT.detach()
            stop_mass = self.reached_p_BT.detach() * stop_p_BT.detach() + reached_prior * prior
            go_mixed_BT = 1 - stop_mass / (2 * self.reached_mixed_BT)
            go_q_BT = go_mixed_BT.clamp_max(going_rows)
            drawn = hashed_uniform(self.places_BT, _SALT + number, self.latent.passes)
            row_B = torch.arange(len(drawn), device=drawn.device)
            stops_BT = (drawn * going_rows >= go_q_BT) | (row_B >= self.rows[number + 1])[:, None]
        share = (self.reached_p_BT / self.reached_q_BT) * bernoulli_kl(logit_BT, prior)
        share = share * self.active_BT
        self.divergence_BT = share if self.divergence_BT is None else self.divergence_BT + share
        stopping, going = self.active_BT & stops_BT, self.active_BT & ~stops_BT
        p_stop, p_go = self.reached_p_BT * stop_p_BT, self.reached_p_BT * (1 - stop_p_BT)
        q_stop, q_go = self.reached_q_BT * (1 - go_q_BT), self.reached_q_BT * go_q_BT
        assert self.weights_BT is not None
        self.weights_BT = torch.where(stopping, p_stop / q_stop, self.weights_BT)
        self.weights_BT = torch.where(going, p_go / q_go, self.weights_BT)  # final if nothing stops it later
        self.reached_p_BT = torch.where(going, p_go, self.reached_p_BT)
        self.reached_q_BT = torch.where(going, q_go, self.reached_q_BT)
        self.reached_mixed_BT = torch.where(going, self.reached_mixed_BT * go_mixed_BT, self.reached_mixed_BT)
        return stops_BT

    def carry(self, state_BTD: Tensor) -> Tensor:
        """The final states, carrying the divergence from the prior in training."""
        if self.divergence_BT is None or not torch.is_grad_enabled():
            return state_BTD
        present = torch.ones_like(self.divergence_BT) if self.present_BT is None else self.present_BT.float()
        mean = (self.divergence_BT * present).sum() / present.sum().clamp_min(1)
        return attach_loss(state_BTD, mean * self.settings.kl_weight * self.latent.auxiliary_scale)


def weighted_surrogate(losses: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
    """Sum of p/q-weighted losses of low variance: a baseline is taken off what reaches p.

    The gradient with respect to p of the sum over exits of p_n b is zero for any b that does not depend on
    the token's own exit, so the mean loss of the other tokens goes.

    Args:
        losses: float32, one a token; `weights` its p/q; `counted` 1 where a token has a label.
    """
    fixed, seen = weights.detach(), losses.detach() * counted
    mean_of_others = (seen.sum() - seen) / (counted.sum() - 1).clamp_min(1)
    through_p = (weights - fixed) * (losses.detach() - mean_of_others)
    return ((fixed * losses + through_p) * counted).sum()
