"""Which tokens a layer processes: Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258) and its controls.

Training with `topk` takes the k tokens of highest score in a sequence, so that later tokens decide about
earlier ones. Generating cannot: a predictor says from a token alone whether it would be among them. With
`threshold` the same causal rule holds in training and after it: a score above a calibrated threshold, slots
filled in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .auxiliary import attach_loss
from .cache import CompactLayer
from .randomness import hashed_uniform
from .selection import Budget, Slots, add_back, first, gather, kth_score, share_of, top_k, within_budget
from .static_cache import StaticCompactLayer

Router = Literal["topk", "threshold", "random", "stride"]
Predictor = Literal["router", "head"]

_INIT_STD = 0.02

KEPT_IN_FP32 = [
    f"routing.{name}"
    for name in ("weight", "bias", "predictor_weight", "predictor_bias", "threshold", "next_threshold")
]
"""What stays float32 in a model that is loaded in half precision, in which a threshold would stop following.
Counts are not among them: transformers would make floats of them."""
FIGURES = ("tokens", "wanted", "processed", "top_k", "agreed")
"""What is counted: tokens, those that the router wanted, those that were processed, the k highest of each
sequence, and how many of these were wanted."""


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """How a layer chooses its tokens.

    Attributes
    ----------
    capacity: share of the tokens that the layer processes.
    router: `topk`, `threshold`, or a control: `random`, `stride` (tokens at equal distances).
    predictor: router `topk`: who decides outside training. `router`: the router's own score, taught by
        a binary cross-entropy on its weights; `head`: a second head on detached hidden states. Either is
        compared with a threshold that keeps the capacity.
    slack, burst: outside training (and with `threshold` in it) a layer processes at most
        ceil(capacity * slack * tokens) + burst of the tokens so far.
    threshold_momentum: how slowly a learned router's threshold follows its scores.
    """

    capacity: float = 0.125
    router: Router = "topk"
    predictor: Predictor = "router"
    slack: float = 1.5
    burst: int = 8
    threshold_momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 1e-4 <= self.capacity <= 1:
            raise ValueError(f"capacity is {self.capacity}: a share from 0.0001 to 1 is meant")
        for name, choices in (("router", get_args(Router)), ("predictor", get_args(Predictor))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.slack < 1 or self.burst < 1:
            raise ValueError(f"slack is {self.slack} and burst {self.burst}: each must be at least 1")
        if not 0 <= self.threshold_momentum < 1:
            raise ValueError(f"threshold_momentum is {self.threshold_momentum}: it must be from 0 to below 1")

    @property
    def learned(self) -> bool:
        """Whether scores are learned; else the router is a control."""
        return self.router in ("topk", "threshold")

    @property
    def budget(self) -> Budget:
        """The bound on what the layer processes where the future is unknown."""
        if self.router == "stride":
            return Budget(self.capacity, 0)
        return Budget(min(1.0, self.capacity * self.slack), self.burst)

    def top_k(self, length: int) -> int:
        """Slots of a sequence in training with `topk` and `random`."""
        return max(1, share_of(length, self.capacity))


class Routing(nn.Module):
    """Chooses tokens, runs a block on them, and adds what the block changed, weighted by the router.

    Args:
        hidden_size: D.
        layer: tells layers apart where numbers are drawn.
    """

    threshold: Tensor
    next_threshold: Tensor
    followed: Tensor
    passes: Tensor
    figures: Tensor

    def __init__(self, hidden_size: int, settings: RoutingSettings, layer: int = 0) -> None:
        super().__init__()
        self.settings, self.layer_idx = settings, layer
        self.auxiliary_scale = 1.0
        self.counting = False
        self.chosen: list[Slots] | None = None  # a list: what each pass chooses is noted in it
        if settings.learned:
            self.weight = nn.Parameter(torch.empty(hidden_size))
        if settings.router == "topk" and settings.predictor == "head":
            self.predictor_weight = nn.Parameter(torch.empty(hidden_size))
            self.predictor_bias = nn.Parameter(torch.empty(1))
        elif settings.router == "topk":
            self.bias = nn.Parameter(torch.empty(1))
        if settings.learned:
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("next_threshold", torch.zeros(()))
            self.register_buffer("followed", torch.zeros((), dtype=torch.long))
        if settings.router == "random":
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("figures", torch.zeros(len(FIGURES), dtype=torch.long), persistent=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = _INIT_STD) -> None:
        """The initial weights: scores near 0, nothing calibrated, nothing counted."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=std) if name == "weight" else nn.init.zeros_(parameter)
        for buffer in self.buffers():
            nn.init.zeros_(buffer)

    def forward(
        self,
        block: Callable[..., Any],
        hidden_BTD: Tensor,
        *,
        present_BT: Tensor | None = None,
        cache: CompactLayer | StaticCompactLayer | None = None,
        run: Callable[[Slots, Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), the same shapes whatever is chosen.

        Args:
            block: f(hidden_BKD) -> (B, K, D), residual connection included.
            present_BT: bool, False for padding; None: no padding.
            cache: what earlier tokens of these rows left.
            run: in place of `block`: also gets the slots, and the columns that each slot may attend to
                (None: causal among the slots).
        """
        if present_BT is None:
            present_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
        scores_BT = self.scores(hidden_BTD)
        slots = self._choose(hidden_BTD, scores_BT, present_BT, cache)
        if self.chosen is not None:
            self.chosen.append(slots)
        chosen_BKD = gather(hidden_BTD, slots)
        columns = None if cache is None else cache.expect(slots, present_BT)
        output_BKD = block(chosen_BKD) if run is None else run(slots, chosen_BKD, columns)
        change_BKD = output_BKD - chosen_BKD
        if self.settings.learned:
            gate_BK = torch.sigmoid(gather(scores_BT[..., None], slots))
            change_BKD = change_BKD * gate_BK.to(change_BKD.dtype)
        return add_back(self._taught(hidden_BTD, scores_BT, slots, present_BT), slots, change_BKD)

    def commit(self) -> None:
        """Between two training passes: the threshold that the last one found, the next random numbers.

        Not inside a pass, which gradient checkpointing runs a second time.
        """
        self._take_threshold()
        if self.settings.router == "random":
            self.passes.add_(1)

    def train(self, mode: bool = True) -> Self:
        """As it leaves training the last pass counts too, which otherwise the next one would take over."""
        if self.training and not mode:
            self._take_threshold()
        return super().train(mode)

    @torch.no_grad()
    def _take_threshold(self) -> None:
        if self.settings.learned:
            self.followed.add_(self.next_threshold != self.threshold)
            self.threshold.copy_(self.next_threshold)

    def scores(self, hidden_BTD: Tensor) -> Tensor:
        """The router's, (B, T): float32, so that one path's rounding is not another path's decision."""
        if not self.settings.learned:
            return hidden_BTD.new_zeros(hidden_BTD.shape[:2], dtype=torch.float32)
        return (hidden_BTD.float() * self.weight.float()).sum(-1)

    def _choose(
        self,
        hidden_BTD: Tensor,
        scores_BT: Tensor,
        present_BT: Tensor,
        cache: CompactLayer | StaticCompactLayer | None,
    ) -> Slots:
        settings, length = self.settings, hidden_BTD.shape[1]
        learning = self.training and torch.is_grad_enabled()
        places_BT = (present_BT.cumsum(-1) - 1).clamp_min(0)
        if cache is not None and cache.started:
            places_BT = places_BT + cache.present_B[:, None]
        with torch.no_grad():
            if self.training and settings.router == "random":
                scores_BT = hashed_uniform(places_BT, self.layer_idx, self.passes)
            if learning and settings.learned:
                self._follow(self.causal_scores(hidden_BTD, scores_BT), present_BT)
            if self.training and settings.router in ("topk", "random"):
                slots = top_k(scores_BT, present_BT, settings.capacity)
                if self.counting:
                    wanted_BT = self.wanted(hidden_BTD, scores_BT, places_BT) & present_BT
                    self._count(scores_BT, present_BT, wanted_BT, slots)
                return slots
            wanted_BT = self.wanted(hidden_BTD, scores_BT, places_BT) & present_BT
            used_B = cache.used_B if cache is not None and cache.started else None
            admitted_BT = within_budget(wanted_BT, places_BT, settings.budget, used_B)
            most = min(length, settings.budget.after(length)) if cache is None else cache.num_slots(length)
            slots = first(admitted_BT, most)
            if self.counting:
                self._count(scores_BT, present_BT, wanted_BT, slots)
            return slots

    def wanted(self, hidden_BTD: Tensor, scores_BT: Tensor, places_BT: Tensor) -> Tensor:
        """What the causal rule wants of each token, whatever comes after it."""
        settings = self.settings
        if settings.capacity == 1:  # a threshold would still leave out the lowest scores
            return torch.ones_like(scores_BT, dtype=torch.bool)
        if settings.learned:
            return self.causal_scores(hidden_BTD, scores_BT) > self.threshold
        return self.wanted_by_place(places_BT)

    def wanted_by_place(self, places_BT: Tensor) -> Tensor:
        """What a control wants, bool (B, T), which a token's place decides alone."""
        settings = self.settings
        if settings.capacity == 1:
            return torch.ones_like(places_BT, dtype=torch.bool)
        if settings.router == "random":
            return hashed_uniform(places_BT, self.layer_idx) < settings.capacity
        return settings.budget.at(places_BT) > settings.budget.at(places_BT - 1)

    def causal_scores(self, hidden_BTD: Tensor, scores_BT: Tensor) -> Tensor:
        """What a token is judged by alone: its predicted chance to be among the k best, or its score.

        A predictor's own decision (its logit above 0) would skip nearly every token while it knows little,
        since few are among the k best; so it too is compared with a threshold that keeps the capacity. Its
        bias is left out: the same for all tokens, and it moves faster than a threshold follows.
        """
        if self.settings.router == "topk" and self.settings.predictor == "head":
            return (hidden_BTD.float() * self.predictor_weight.float()).sum(-1)
        return scores_BT

    def _predicted(self, hidden_BTD: Tensor) -> Tensor:
        """The logit of being among the k highest; its gradient reaches the predictor's own weights only."""
        hidden_BTD = hidden_BTD.detach().float()
        if self.settings.predictor == "head":
            return (hidden_BTD * self.predictor_weight.float()).sum(-1) + self.predictor_bias.float()
        return (hidden_BTD * self.weight.float()).sum(-1) + self.bias.float()

    def _follow(self, scores_BT: Tensor, present_BT: Tensor) -> None:
        """The next threshold: towards the score that a share `capacity` of these tokens exceeds."""
        found = kth_score(scores_BT, present_BT, self.settings.capacity)
        # The first passes are averaged evenly, so that nothing of the arbitrary start is left.
        even = self.followed / (self.followed + 1)
        momentum = even.clamp_max(self.settings.threshold_momentum)
        moved = momentum * self.threshold + (1 - momentum) * found
        self.next_threshold.copy_(torch.where(present_BT.any(), moved, self.threshold))

    def _taught(self, hidden_BTD: Tensor, scores_BT: Tensor, slots: Slots, present_BT: Tensor) -> Tensor:
        """The hidden states, carrying the predictor's loss in training with `topk`."""
        if not (self.training and torch.is_grad_enabled() and self.settings.router == "topk"):
            return hidden_BTD
        target_BT = torch.zeros_like(scores_BT).scatter(-1, slots.index_BK, slots.filled_BK.float())
        logits_BT = self._predicted(hidden_BTD)
        loss_BT = F.binary_cross_entropy_with_logits(logits_BT, target_BT, reduction="none")
        loss = (loss_BT * present_BT).sum() / present_BT.sum().clamp_min(1)
        return attach_loss(hidden_BTD, loss * self.auxiliary_scale)

    def _count(self, scores_BT: Tensor, present_BT: Tensor, wanted_BT: Tensor, slots: Slots) -> None:
        best = top_k(scores_BT, present_BT, self.settings.capacity)
        best_BT = torch.zeros_like(present_BT).scatter(-1, best.index_BK, best.filled_BK)
        counted = (present_BT, wanted_BT, slots.filled_BK, best_BT, best_BT & wanted_BT)
        self.figures += torch.stack([each.sum() for each in counted])
