"""A halting head taught on a frozen model: go on while a later iteration makes the token's loss smaller.

The second stage of Zhu et al. 2025 (arXiv:2510.25741). The head sees every exit of every token, where
training by sampled exits sees one, and nothing else of the model moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .latent import LatentReasoning
from .model import IGNORED, LahrForCausalLM


@dataclass(frozen=True)
class ExitLosses:
    """What each exit of each token would have cost.

    Attributes
    ----------
    losses_NBT: float32, next-token cross-entropy in nats after each iteration; 0 where nothing is counted.
    counted_BT: bool, whether the token has a label.
    states_NBTD: the states after each iteration, before the final norm.
    """

    losses_NBT: Tensor
    counted_BT: Tensor
    states_NBTD: Tensor


@torch.no_grad()
def exit_losses(model: LahrForCausalLM, batch: Mapping[str, Tensor]) -> ExitLosses:
    """The losses of all exits, where every token goes through every iteration, without dropout.

    Args:
        batch: `input_ids`; `labels` (default: the inputs, without padding) and `attention_mask`, if any.

    Raises
    ------
    ValueError
        If the model has no latent block.
    """
    if model.model.latent is None:
        raise ValueError(
            "the model has no latent block, so that there are no exits: train one with lahr_latent"
        )
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None:
        labels = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), IGNORED)
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    was_training = model.training
    model.eval()
    try:
        output = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False, all_exits=True)
        losses = [_losses(model, state_BTD, shifted) for state_BTD in output.exits]
    finally:
        model.train(was_training)
    return ExitLosses(torch.stack(losses), shifted != IGNORED, output.exits)


def _losses(model: LahrForCausalLM, state_BTD: Tensor, shifted_BT: Tensor) -> Tensor:
    logits_BTV = model.lm_head(model.model.norm(state_BTD)).float()
    return F.cross_entropy(logits_BTV.mT, shifted_BT, ignore_index=IGNORED, reduction="none")


def stop_targets(losses_NBT: Tensor, tau: float, lookahead: int) -> Tensor:
    """1 where none of the next `lookahead` iterations gains more than `tau` nats, float32 (N - 1, B, T)."""
    later = [losses_NBT[n + 1 : n + 1 + lookahead].amin(0) for n in range(len(losses_NBT) - 1)]
    return (losses_NBT[:-1] - torch.stack(later) <= tau).float()


def renew_halting_head(model: LahrForCausalLM) -> None:
    """An untrained halting head, in place, also for a model whose halting was another; nothing else moves.

    Raises
    ------
    ValueError
        If there is no latent block, or no decision: it iterates once.
    """
    latent = model.model.latent
    if latent is None:
        raise ValueError(
            "the model has no latent block, so that there is nothing to halt: train one with --arch lahr and "
            "--lahr.condition full, no_mod, no_memory or latent_only"
        )
    if latent.settings.iterations < 2:
        raise ValueError(
            "the latent block iterates once, so that there is nothing to decide: train one with "
            "--lahr.iterations 2 or more"
        )
    latent.settings = replace(latent.settings, halting="learned")
    model.config.latent = {**(model.config.latent or {}), "halting": "learned"}
    latent.halt_weight = torch.nn.Parameter(torch.zeros_like(latent.inject))
    latent.halt_bias = torch.nn.Parameter(latent.inject.new_zeros(latent.settings.iterations - 1))


def train_halting_head(
    model: LahrForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    tau: float = 0.01,
    lookahead: int | None = None,
    lr: float = 0.01,
) -> list[float]:
    """Train the halting head, and nothing else, in place; returns the binary cross-entropy of each batch.

    Args:
        batches: see `exit_losses`; one optimizer step each.
        tau: nats; an iteration that gains less is not worth it.
        lookahead: how many iterations ahead a gain may lie; None: any number, for losses that fall late.
        lr: Adam's, for the weights times the root of their number; it falls to 0 linearly where the number
            of batches is known.

    Raises
    ------
    ValueError
        If the model has no halting head.
    """
    latent = model.model.latent
    if latent is None or not latent.settings.learns:
        raise ValueError(
            "the model has no halting head: build it with halting='learned' and 2 iterations or more"
        )
    head = [latent.halt_weight, latent.halt_bias]
    # The states are read at length 1 for the sake of what is trained through them; here nothing is.
    rates = [lr * math.sqrt(latent.halt_weight.numel()), lr]
    optimizer = torch.optim.Adam(
        [{"params": [each], "lr": rate} for each, rate in zip(head, rates, strict=True)]
    )
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    found: list[float] = []
    for batch in batches:
        if total is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - len(found) / total)
        loss = halting_loss(latent, exit_losses(model, batch), tau, lookahead)
        for parameter, grad in zip(head, torch.autograd.grad(loss, head), strict=True):
            parameter.grad = grad
        optimizer.step()
        found.append(loss.item())
    optimizer.zero_grad(set_to_none=True)
    return found


def halting_loss(
    latent: LatentReasoning, exits: ExitLosses, tau: float, lookahead: int | None = None
) -> Tensor:
    """The head's binary cross-entropy over decisions and counted tokens, float32 scalar."""
    decisions = latent.settings.iterations - 1
    targets = stop_targets(exits.losses_NBT, tau, lookahead or decisions)
    logits = torch.stack([latent.stop_logit(n, exits.states_NBTD[n]) for n in range(decisions)])
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * exits.counted_BT).sum() / (decisions * exits.counted_BT.sum()).clamp_min(1)
